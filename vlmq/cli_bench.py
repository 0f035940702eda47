"""The command `vlmq bench`: how fast models generate and what they need, and how fast the kernels are."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vlmq import terminal
from vlmq.eval import bench_llama_cpp
from vlmq.eval.bench_cpu import MAX_LOAD, bench_cpu, roofline_points
from vlmq.eval.bench_gpu import bench_gpu, check_gpu
from vlmq.eval.bench_gpu import dry_run as list_measurements
from vlmq.eval.bench_gpu_layers import FORMATS, JOINT_INPUTS, JOINT_WIDTHS, LAYERS
from vlmq.eval.bench_gpu_table import gpu_roofline_points, models_table, results_table
from vlmq.eval.bench_models import PRESET, Job, bench_models
from vlmq.eval.presets import PRESETS
from vlmq.eval.report import Table, as_json, as_markdown, as_rich
from vlmq.eval.roofline import draw_roofline

PRESET_NAMES = ", ".join(PRESETS)


def bench_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders or hub names, packed or not; or preset:NAME for random weights of a known shape "
            f"({PRESET_NAMES}); or bitsandbytes:MODEL, gptqmodel:MODEL for these packages. The first is the baseline."
        ),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time the kernels on layers of random codes instead of models.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Time tiles of the GPU kernels and keep the fastest for this user.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what --kernels --device cuda measures; needs no GPU.")
    ] = False,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Also measure each preset packed so, with random codes. Repeatable."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="llama.cpp: beside it, on the same weights.")] = None,
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
    if kernels + tune + bool(models) != 1:
        raise ValueError("vlmq bench takes models to measure, or --kernels, or --tune: one of them")
    on_gpu = device is not None and device.startswith("cuda")
    if dry_run and not (kernels and on_gpu):
        raise ValueError("--dry-run lists what --kernels --device cuda measures; give these two with it")
    if tune:
        _tune(device)
        return
    if kernels and against is None:
        if dry_run:
            typer.echo(as_json({"measurements": list_measurements()}))
            return
        if device is not None and on_gpu:
            table, record = _bench_gpu(device, out)
        else:
            table, record = _bench_kernels(device, threads, out)
        _show_bench(table, record, "kernels", out, json)
        return
    counts = {"n_prompt": n_prompt, "n_new": n_new, "n_runs": runs}
    if against is not None:
        preset = _preset_against(against, models or [], {"--device": device, "--text": text, "--vqa": vqa})
        _show_bench(*_bench_against(preset, scheme or [], threads, counts), "against", out, json)
        return
    jobs = [
        Job(
            model,
            device=device,
            threads=threads,
            **counts,
            text=None if text is None else str(text),
            n_windows=n_windows,
            vqa=vqa,
            n_questions=n_questions,
            trust_remote_code=trust_remote_code,
        )
        for model in expand(models or [], scheme or [])
    ]
    table, records = bench_models(jobs, report=terminal.show_step)
    _show_bench(table, {"models": records}, "bench", out, json)


def _bench_kernels(device: str | None, threads: int | None, out: Path | None) -> tuple[Table, dict[str, Any]]:
    """Time the kernels of the CPU; with a folder, draw them under the roofline of the machine."""
    if device not in (None, "cpu"):
        raise ValueError(f"--kernels times those of the CPU or of a CUDA GPU, got --device {device}")
    table, record = bench_cpu(threads or torch.get_num_threads(), report=terminal.show_step)
    _warn_of_load(record["machine"]["load"])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        points, bandwidth = roofline_points(record)
        n_threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
        subtitle = f"4096 x 4096, weights from memory, {n_threads}, torch {record['torch']}"
        title = "Packed layers on this CPU, one token"
        draw_roofline(
            out / "roofline.png",
            title,
            points,
            bandwidth=bandwidth,
            peak=record["dense_peak"],
            subtitle=subtitle,
        )
    return table, record


def _bench_gpu(device: str, out: Path | None) -> tuple[Table, dict[str, Any]]:
    """Time the kernels of a GPU and whole models; with a folder, write as it goes, and draw the roofline."""
    check_gpu()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    terminal.show_step("timing the GPU kernels and whole models, about eight minutes at most")
    with torch.cuda.device(device):
        record = bench_gpu(None if out is None else out / "kernels.json", report=terminal.show_step)
    for missing in ("failed", "skipped_for_time"):
        if n_missing := sum(len(part[missing]) for part in (record, record["models"], record["peers"])):
            terminal.show_warning(f"{n_missing} measurements: {missing}, see the JSON")
    points, ceilings = gpu_roofline_points(record), record["ceilings"]
    if out is not None and points:
        draw_roofline(
            out / "roofline.png",
            f"Packed layers on {record['gpu']}",
            points,
            bandwidth=ceilings["copy_bytes_per_second"],
            peak=ceilings["matmul_operations_per_second"],
            subtitle=f"one layer, weights from memory, torch {record['torch']}",
        )
    models = models_table(record)
    terminal.show_step(as_markdown(models))
    if out is not None:
        (out / "models.md").write_text(as_markdown(models))
    return results_table(record), record


def _tune(device: str | None) -> None:
    """Tune the layers of the kernel benchmark for one and for sixteen tokens."""
    check_gpu()
    from vlmq.kernels.triton_config import user_table
    from vlmq.kernels.triton_tune import Shape, tune

    shapes = [
        Shape(name, group_size, out_features, in_features, n_tokens)
        for in_features, out_features in (*LAYERS, (JOINT_INPUTS, sum(JOINT_WIDTHS)))
        for name, group_size in FORMATS
        for n_tokens in (1, 16)
    ]
    terminal.show_step(f"tuning {len(shapes)} shapes")
    with torch.cuda.device(device or "cuda"), torch.inference_mode():
        tune(shapes, report=terminal.show_step)
    terminal.show_step(f"wrote {user_table()}; it counts from the next process on")


def _preset_against(against: str, models: list[str], refused: dict[str, Any]) -> str:
    """Name of the preset to compare.

    Raises:
        ValueError: an engine that is not known, anything but one preset, or an option that has no meaning here.
    """
    if against != bench_llama_cpp.NAME:
        raise ValueError(f"--against {against!r} is unknown; known: {bench_llama_cpp.NAME}")
    given = [name for name, value in refused.items() if value is not None]
    if given:
        raise ValueError(f"--against compares speed on the CPU, without {' and '.join(given)}")
    if len(models) != 1 or not models[0].startswith(PRESET) or "@" in models[0]:
        raise ValueError(f"--against takes one preset and its --scheme, such as {PRESET}llama-2048")
    return models[0].removeprefix(PRESET)


def _bench_against(
    preset: str, schemes: list[str], threads: int | None, counts: dict[str, int]
) -> tuple[Table, dict[str, Any]]:
    tables, record = bench_llama_cpp.bench_llama_cpp(
        preset, schemes, [threads or torch.get_num_threads()], report=terminal.show_step, **counts
    )
    _warn_of_load(record["machine"]["load"])
    return tables[0], record


def _warn_of_load(load: float) -> None:
    if load > MAX_LOAD:
        terminal.show_warning(f"load average {load:.1f}: other jobs run here, the figures say little")


def _show_bench(table: Table, content: dict[str, Any], name: str, out: Path | None, json: bool) -> None:
    text = as_json(content)
    if json:
        typer.echo(text)
    else:
        terminal.show_table(as_rich(table))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(text + "\n")
        (out / f"{name}.md").write_text(as_markdown(table))
        terminal.show_step(f"wrote {out / name}.json and {name}.md")


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
