"""A process of its own that answers lines: so that several models can take turns in one run.

    with start("vlmq.eval.bench_models", '{"model": "my-folder"}', "my-folder") as child:
        child.ask("run")

Each has its own threads, its own peak of memory, and nothing to do while another is timed. What its libraries print
goes to stderr, whose last line says why it failed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any


class Child:
    """The parent's end."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.name = name
        self.process = process
        self.errors = errors

    def ask(self, line: str) -> Any:
        """Send a line and wait for the answer, a JSON value.

        Raises:
            RuntimeError: the process has ended; the message holds its last line.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors if line.strip()]
            raise RuntimeError(f"{self.name}: {lines[-1] if lines else f'exit code {code}'}")
        return json.loads(answer)


@contextmanager
def start(module: str, argument: str, name: str) -> Iterator[Child]:
    """Start `python -m module argument`; it is ended when the context is left."""
    command = [sys.executable, "-m", module, argument]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        try:
            yield Child(name, process, errors)
        finally:
            process.kill()
            process.communicate()


def serve(answer: Callable[[str], Any]) -> None:
    """In the process: answer each line of stdin with a line of JSON, until there are no more."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps(answer(line.strip())), file=answers, flush=True)
