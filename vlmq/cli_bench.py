"""The command `vlmq bench`: how fast models generate, and what they need."""

from pathlib import Path
from typing import Annotated

import typer

from vlmq import terminal
from vlmq.eval.bench_models import PRESET, Job, bench_models
from vlmq.eval.presets import PRESETS
from vlmq.eval.report import as_json, as_markdown, as_rich

PRESET_NAMES = ", ".join(PRESETS)


def bench_command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders or hub names, packed or not; or preset:NAME for random weights of a known shape "
            f"({PRESET_NAMES}). The first is the baseline."
        ),
    ],
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Also measure each preset packed so, with random codes. Repeatable."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file, for perplexity.")] = None,
    vqa: Annotated[
        str | None,
        typer.Option(help="A .jsonl of image, question, answer; or shapes, the shipped questions."),
    ] = None,
    n_prompt: Annotated[int, typer.Option(help="Tokens of the random prompt of a language model.")] = 64,
    n_new: Annotated[int, typer.Option(help="Tokens generated per run.")] = 64,
    runs: Annotated[int, typer.Option(help="Counted runs.")] = 5,
    n_windows: Annotated[int | None, typer.Option(help="Windows of text; all unless told.")] = None,
    n_questions: Annotated[int | None, typer.Option(help="Questions; all unless told.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads on the CPU; torch's choice unless told.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.md.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cuda:1; the CPU unless told.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure how fast MODELS generate, their memory, and with --text or --vqa their quality."""
    jobs = [
        Job(
            model,
            device=device,
            threads=threads,
            n_prompt=n_prompt,
            n_new=n_new,
            n_runs=runs,
            text=None if text is None else str(text),
            n_windows=n_windows,
            vqa=vqa,
            n_questions=n_questions,
            trust_remote_code=trust_remote_code,
        )
        for model in expand(models, scheme or [])
    ]
    table, records = bench_models(jobs, report=terminal.show_step)
    content = as_json({"models": records})
    if json:
        typer.echo(content)
    else:
        terminal.out.print(as_rich(table))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(content + "\n")
        (out / "bench.md").write_text(as_markdown(table))
        terminal.show_step(f"wrote {out / 'bench.json'} and {out / 'bench.md'}")


def expand(models: list[str], schemes: list[str]) -> list[str]:
    """Each preset followed by its packed variants.

    Raises:
        ValueError: schemes are given, but no preset: checkpoints are packed by `vlmq quantize`.
    """
    if schemes and not any(model.startswith(PRESET) for model in models):
        raise ValueError(
            "--scheme packs presets only; pack a checkpoint with vlmq quantize and name its folder"
        )
    expanded: list[str] = []
    for model in models:
        expanded.append(model)
        if model.startswith(PRESET) and "@" not in model:
            expanded += [f"{model}@{scheme}" for scheme in schemes]
    return expanded
