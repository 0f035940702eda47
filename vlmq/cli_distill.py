"""The command `vlmq distill`: train a quantized model towards its original."""

from pathlib import Path
from typing import Annotated

import typer

from vlmq import checkpoint, terminal
from vlmq.attach import earlier_quantizer
from vlmq.calib.data import load
from vlmq.distill_settings import DEFAULT_TRAINED, read_tuning
from vlmq.distillation import check_teacher, distill
from vlmq.eval.summary import part_table
from vlmq.opening import open_model, open_processor
from vlmq.options import parse_options
from vlmq.straight_through import TRAINABLE


def distill_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the original, or of a packed model.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed model.")],
    data: Annotated[str, typer.Option(help="Pairs, or questions with answers: a .jsonl, or a known set.")],
    scheme: Annotated[str, typer.Option(help="Format and group size, for an original.")] = "ternary",
    teacher: Annotated[str | None, typer.Option(help="The original of a packed model.")] = None,
    layers: Annotated[str | None, typer.Option(help="Q-FFN or Q-ALL, for an original.")] = None,
    n_steps: Annotated[int, typer.Option(help="Most steps of training.")] = 300,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 3e-3,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 64,
    trained: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TRAINABLE)}. Repeatable.")] = None,
    saliency: Annotated[str, typer.Option(help="Weights of the answers' tokens.")] = "uniform",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help="Such as soft_share=0.3. Repeatable.")
    ] = None,
    n_samples: Annotated[int, typer.Option(help="Rows of the data.")] = 2048,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Go on from here if interrupted.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Of the data's order and split.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Distil MODEL, an original or packed with --teacher, and save it packed into OUT."""
    options = parse_options(option or [])
    read_tuning(options)
    checkpoint.check_target(out)
    with terminal.working("loading"):
        processor = open_processor(model)
        loaded = open_model(model)
        original = None if teacher is None else open_model(teacher)
        if earlier_quantizer(loaded) is not None:
            check_teacher(loaded, original)
        rows = load(data, processor, n_samples=n_samples, batch_size=batch_size, seed=seed)
    distill(
        loaded,
        rows,
        scheme,
        original,
        n_steps=n_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        trained=trained or DEFAULT_TRAINED,
        saliency=saliency,
        options=options,
        overrides=layers,
        bf16=bf16,
        checkpoint_dir=checkpoint_dir,
        seed=seed,
        progress=terminal.LiveTraining(),
    )
    checkpoint.save(loaded, out, processor)
    record = loaded.config.quantization_config.metadata["distilled"]
    lines = [f"{key}: {value}" for key, value in record.items()]
    terminal.show({"parts": part_table(loaded), "distilled": record}, json, lines=lines)
