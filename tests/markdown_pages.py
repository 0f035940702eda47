"""Markdown pages whose fenced blocks run, in order, as their reader would run them.

| info string | what happens |
|---|---|
| `python` | executed in one namespace per page; with `title="file"` written to that file instead |
| `sh` | each line is a command: `vlmq ...` in this process |
| `text` | what the block before it prints, or the error that it ends in |
| `diff` | applied to the folder |

Anything else is an error, so no block stands there unread. An error that no `text` block shows fails the page. In a
`text` block `...` stands for anything, white space is not compared, and a number with a decimal point may differ by
5 % or by two in its last place: another CPU rounds otherwise.
"""

import contextlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from vlmq import cli

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(\.\.\.|\d+\.\d+)")
RUNS = ("python", "sh")
Run = Callable[[str], str]


@dataclass(frozen=True)
class Fenced:
    """One fenced block: what it is, its content, its first line's number, and the file it is to be written to."""

    kind: str
    code: str
    line: int
    title: str | None


def fenced_blocks(text: str) -> list[Fenced]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: an unknown info string, output without a block that prints it, or a fence left open.
    """
    found: list[Fenced] = []
    ends = 0
    for match in FENCE.finditer(text):
        kind, _, rest = match["info"].partition(" ")
        line = text.count("\n", 0, match.start()) + 2
        title = re.fullmatch(r'title="([^"]+)"', rest)
        if kind not in (*RUNS, "text", "diff") or (rest and not title):
            raise ValueError(f"line {line}: unknown block {match['info']!r}")
        if kind == "text" and not (found and found[-1].kind in RUNS and found[-1].title is None):
            raise ValueError(f"line {line}: output of no block")
        found.append(Fenced(kind, match["code"], line, title[1] if title else None))
        ends += 2
    if len(re.findall(r"^```", text, re.MULTILINE)) != ends:
        raise ValueError("a fence is not closed")
    return found


def broken_links(path: Path) -> list[str]:
    """The relative links of a page to a file, or a heading of a page, that there is not."""
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCE.sub("", path.read_text())):
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        if not there.exists() or (anchor and anchor not in _anchors(there.read_text())):
            broken.append(target)
    return broken


def _anchors(text: str) -> set[str]:
    """What a link to a heading is called: lower case, no punctuation, a hyphen for each space."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_page(path: Path, command: Run | None = None) -> None:
    """Run a page in the current folder.

    Args:
        path: the page.
        command: runs a line of a `sh` block and returns what it printed; None knows `vlmq` only.

    Raises:
        AssertionError: a block printed something else than the page shows, or failed where the page shows no error.
    """
    blocks = fenced_blocks(path.read_text())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block, after in itertools.pairwise([*blocks, None]):
        where = f"{path}:{block.line}"
        if block.title is not None:
            Path(block.title).write_text(block.code)
        elif block.kind == "diff":
            apply_diff(block.code)
        elif block.kind in RUNS:
            shown = after.code if after is not None and after.kind == "text" else None
            if block.kind == "python":
                printed, error = _run_python(block, where, namespace)
            else:
                printed, error = _run_commands(block.code, command or run_vlmq)
            if error is not None and shown is None:
                raise AssertionError(f"{where}: {error}\n{printed}")
            if shown is not None:
                check_output(shown, printed + (error or ""), where)


def apply_diff(diff: str) -> None:
    """Change one file of the current folder as a unified diff of one hunk says; its context finds the place.

    Raises:
        ValueError: the lines that the diff starts from do not stand in the file, or more than once.
    """
    lines = diff.splitlines(keepends=True)
    path = Path(lines[1].split()[1].removeprefix("b/"))
    before = "".join(line[1:] for line in lines[3:] if line[0] in " -")
    after = "".join(line[1:] for line in lines[3:] if line[0] in " +")
    text = path.read_text()
    if text.count(before) != 1:
        raise ValueError(f"{path} does not hold once:\n{before}")
    path.write_text(text.replace(before, after))


def check_output(shown: str, printed: str, where: str) -> None:
    """Compare what a page shows with what was printed.

    Raises:
        AssertionError: they differ.
    """
    parts = NUMBER.split(" ".join(shown.split()))
    pattern = "".join(
        ".*?" if part == "..." else r"(\d+\.\d+)" if i % 2 else re.escape(part)
        for i, part in enumerate(parts)
    )
    match = re.fullmatch(pattern, " ".join(printed.split()), re.DOTALL)
    expected = [part for part in parts[1::2] if part != "..."]
    if match is None or not all(map(_are_close, expected, match.groups())):
        raise AssertionError(f"{where}: the page shows\n{shown}\nand the block prints\n{printed}")


def _are_close(expected: str, found: str) -> bool:
    last_place = 10.0 ** -len(expected.partition(".")[2])
    allowed = max(0.05 * float(expected), 2 * last_place)
    return abs(float(expected) - float(found)) <= allowed * 1.0001


def _run_python(block: Fenced, where: str, namespace: dict[str, Any]) -> tuple[str, str | None]:
    code = compile("\n" * (block.line - 1) + block.code, where.rpartition(":")[0], "exec")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    except Exception as error:
        return printed.getvalue(), f"{type(error).__name__}: {error}"
    return printed.getvalue(), None


def _run_commands(code: str, run: Run) -> tuple[str, str | None]:
    printed = ""
    for line in code.replace("\\\n", " ").splitlines():
        try:
            printed += run(line)
        except CommandError as error:
            return printed, str(error)
    return printed, None


class CommandError(Exception):
    """A command that ended in another exit code than 0; the text is its last line on stderr."""


def run_vlmq(line: str) -> str:
    """Run a `vlmq` command in this process; returns what it printed on stdout.

    Raises:
        CommandError: it ended in an error.
        ValueError: it is another command.
    """
    arguments = shlex.split(line, comments=True)
    if arguments[:1] != ["vlmq"]:
        raise ValueError(f"only vlmq commands run here, got {line!r}")
    out, err = io.StringIO(), io.StringIO()
    with _console(out, err), mock.patch.object(sys, "argv", arguments):
        try:
            cli.main()
        except SystemExit as stopped:
            if stopped.code:
                raise CommandError(err.getvalue().strip().splitlines()[-1]) from None
    return out.getvalue()


@contextlib.contextmanager
def _console(out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    """rich looks sys.stdout and sys.stderr up when it prints."""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
