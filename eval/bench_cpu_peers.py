"""Layers of other packages on the CPU, in turns with those of `vlmq.eval.bench_cpu`, where they are installed.

Each package runs in a process of its own, which waits while others are timed: importing one changes settings of torch,
writes to stdout, may end the process. What cannot be made says why in its row, and the others go on.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlmq.eval import child, peers
from vlmq.eval.peers import CPU_ROWS, PeerLayer
from vlmq.eval.turns import SLOW_MILLISECONDS, Turn, second_of_two

NAMES = tuple(dict.fromkeys(row.peer for row in CPU_ROWS))


@dataclass(frozen=True)
class Spec:
    """What a process does: the rows of one package, square layers of `size`, with copies of `rotation_bytes`."""

    peer: str
    threads: int
    size: int
    rotation_bytes: int


def open_rows(
    stack: ExitStack,
    names: Sequence[str],
    threads: int,
    size: int,
    rotation_bytes: int,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[dict[tuple[str, str], Turn], list[tuple[str, str]]]:
    """Start a process per package that is installed, and make its layers.

    Args:
        stack: ends the processes.
        names: keys of `vlmq.eval.peers.PEERS`.
        report: told a line before each package.

    Returns:
        the rows by name and path, and (name, reason) of what cannot run.
    """
    rows: dict[tuple[str, str], Turn] = {}
    not_run: list[tuple[str, str]] = []
    for name in names:
        reason = peers.why_not(name)
        if reason is not None:
            not_run.append((name, reason))
            continue
        report(f"making layers of {name}; what it compiles when first used may take minutes")
        spec = json.dumps(asdict(Spec(name, threads, size, rotation_bytes)))
        process = stack.enter_context(child.start("vlmq.eval.bench_cpu_peers", spec, name))
        version = peers.version_of(name)
        for number, row in enumerate(CPU_ROWS):
            if row.peer != name:
                continue
            label = f"{name} {version} {row.scheme}"
            try:
                made = process.ask(f"open {number}")
            except RuntimeError as error:
                not_run.append((label, str(error)))
                break
            if "reason" in made:
                not_run.append((label, made["reason"]))
                continue
            rows[label, made["path"]] = Turn(
                lambda i, process=process, number=number: process.ask(f"turn {number} {i}"),
                made["n_bytes"],
                8 * made["n_bytes"] / size**2,
                made["error"],
                made["milliseconds"] > SLOW_MILLISECONDS,
            )
    return rows, not_run


class Answers:
    """The layers that a process has made."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        torch.set_num_threads(spec.threads)
        torch.manual_seed(0)
        self.x = torch.randn(1, spec.size, dtype=torch.bfloat16)
        self.layers: dict[int, PeerLayer] = {}

    def make(self, number: int) -> dict[str, Any]:
        """Make a row's layers and call each once; how exact and how slow, or why not."""
        row, size = CPU_ROWS[number], self.spec.size
        weight = torch.randn(size, size, dtype=torch.bfloat16) / size**0.5
        n_copies = 2 + self.spec.rotation_bytes // (size * size * row.bits // 8)
        try:
            layer = peers.build(row, weight, n_copies)
            error = peers.error_of(layer, self.x)
            self.layers[number] = layer
            for call in layer.calls:  # some pack anew, or compile, in the first call
                call(self.x)
            times = [self.turn(number, i) for i in range(3)]
        except peers.FAILURES as why:
            return {"reason": f"{type(why).__name__}: {why}".splitlines()[0]}
        return {
            "path": layer.path,
            "n_bytes": layer.n_bytes,
            "error": error,
            "milliseconds": statistics.median(times),
        }

    def turn(self, number: int, i: int) -> float:
        """Milliseconds of the second of two calls."""
        calls = self.layers[number].calls
        return second_of_two(lambda k: calls[k % len(calls)](self.x), i)

    def answer(self, line: str) -> Any:
        """Answer a line: "open ROW" or "turn ROW I"."""
        command, *numbers = line.split()
        with torch.inference_mode():
            return {"open": self.make, "turn": self.turn}[command](*map(int, numbers))


def main() -> None:
    """Answer the parent about the package that the JSON in the first argument describes."""
    child.serve(Answers(Spec(**json.loads(sys.argv[1]))).answer)


if __name__ == "__main__":
    main()
