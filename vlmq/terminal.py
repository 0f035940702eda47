"""What the command line shows: the live progress of `quantize`, tables, and errors in one line.

Progress, messages and errors go to stderr and results to stdout, so `--json` output can be piped.
"""

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import huggingface_hub
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable

from vlmq.eval.report import Table, as_json, as_rich
from vlmq.report import EpochReport, LayerReport

WIDTH_OF_FILES = 200

out = Console(soft_wrap=True)
err = Console(stderr=True)


class LiveProgress:
    """A bar over the layers: block, layer, proxy loss, time spent and left; notes of a layer stay above it.

    Where stderr is no terminal, one line per block is written instead.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[where]}", style="cyan"),
            console=err,
            transient=True,
        )
        self._blocks: list[str] = []
        self._n_blocks = 0
        self._task = self._bar.add_task(title, total=None, where="", visible=False)

    def start(self, n_blocks: int, n_layers: int) -> None:
        """Show an empty bar."""
        self._blocks, self._n_blocks = [], n_blocks
        self._bar.reset(self._task, total=n_layers, where="calibrating", visible=True)
        if err.is_terminal:
            self._bar.start()

    def layer(self, report: LayerReport, block_name: str) -> None:
        """Move on by one layer."""
        if block_name not in self._blocks:
            self._blocks.append(block_name)
            if not err.is_terminal:
                err.print(f"{self._title}: block {len(self._blocks)}/{self._n_blocks} {block_name}")
        name = report.name.removeprefix(f"{block_name}.")
        where = (
            f"loss {report.proxy_loss:.2e}  block {len(self._blocks)}/{self._n_blocks}  {block_name}  {name}"
        )
        self._bar.update(self._task, advance=1, where=where)
        for note in report.notes:
            err.print(f"{report.name}: {note}", style="yellow")

    def epoch(self, report: EpochReport) -> None:
        """Show the losses of one pass of the learning of a block."""
        losses = f"loss {report.training_loss:.3g}  held out {report.start_loss:.3g} -> {report.validation_loss:.3g}"
        where = f"{report.block}  learning {report.epoch}/{report.n_epochs}  {losses}"
        self._bar.update(self._task, where=where)
        if not err.is_terminal and report.epoch == report.n_epochs:
            err.print(f"{self._title}: {where}")

    def finish(self) -> None:
        """Take the bar away."""
        if err.is_terminal:
            self._bar.stop()


class LiveTraining:
    """A bar over the steps with the losses; where stderr is no terminal, one line per validation."""

    def __init__(self) -> None:
        columns = (TextColumn("[bold]distill"), BarColumn(bar_width=24), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
        losses = TextColumn("{task.fields[losses]}", style="cyan")
        self._bar = Progress(*columns, *times, losses, console=err, transient=True)
        self._task = self._bar.add_task("distill", total=None, losses="")

    def start(self, n_steps: int, first: int) -> None:
        """Show the bar, where an interrupted run goes on."""
        self._bar.update(self._task, total=n_steps, completed=first)
        if err.is_terminal:
            self._bar.start()

    def step(self, number: int, losses: dict[str, float]) -> None:
        """Move on by one step."""
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._bar.update(self._task, completed=number, losses=text)

    def validated(self, number: int, loss: float, is_best: bool) -> None:
        """One line that stays."""
        err.print(
            f"step {number}: validation loss {loss:.4f}{', the best yet' if is_best else ''}", highlight=False
        )

    def finish(self) -> None:
        """Take the bar away."""
        if err.is_terminal:
            self._bar.stop()


def follow(logger_name: str) -> None:
    """Show what a module reports of its steps, on stderr."""
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    logger.addHandler(_Lines())


class _Lines(logging.Handler):
    """Prints each message as a line, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(record.getMessage(), soft_wrap=True, highlight=False, markup=False)


def show_step(message: str) -> None:
    """What is being done, one line on stderr."""
    err.print(message, soft_wrap=True, highlight=False, markup=False)


def show(content: dict[str, Any], is_json: bool, *, lines: Sequence[str] = ()) -> None:
    """Print the tables of a report and then lines, or all of its content as JSON; results on stdout."""
    if is_json:
        sys.stdout.write(as_json(content) + "\n")
        return
    for value in content.values():
        if isinstance(value, Table):
            show_table(as_rich(value))
    for line in lines:
        out.print(line, highlight=False, markup=False)


def show_table(table: RichTable) -> None:
    """A table on stdout, as wide as the terminal; in a file or a pipe as wide as it needs to be."""
    Console(soft_wrap=True, width=None if out.is_terminal else WIDTH_OF_FILES).print(table)


def show_error(message: str) -> None:
    """One line on stderr."""
    err.print(f"[bold red]error:[/] {_escape(' '.join(message.split()))}", soft_wrap=True, highlight=False)


def show_warning(message: str) -> None:
    """One line on stderr."""
    err.print(f"[bold yellow]warning:[/] {_escape(message)}", soft_wrap=True, highlight=False)


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner with what is going on; nothing where stderr is no terminal."""
    if not err.is_terminal:
        yield
        return
    with err.status(text):
        yield


@contextmanager
def stoppable(hint: str) -> Iterator[None]:
    """SIGTERM stops the work as Ctrl-C does; one line says how to go on, the exit code names the signal.

    Args:
        hint: how to go on, where what was stopped has no note on it.
    """
    received: list[int] = [signal.SIGINT]

    def stop(number: int, frame: Any) -> None:
        received[0] = number
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as stopped:
        show_error("; ".join(["stopped", *getattr(stopped, "__notes__", (hint,))]))
        raise SystemExit(128 + received[0]) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """Keep bars of other libraries and the hub's retries out of the way of ours; warnings of transformers stay."""
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    logging.captureWarnings(True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
