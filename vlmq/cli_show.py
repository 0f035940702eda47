"""What the commands show of a plan and of a packed model."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vlmq import terminal
from vlmq.eval.report import Table
from vlmq.eval.size import disk_bytes, model_size
from vlmq.eval.summary import plan_table, share_table
from vlmq.planning import Plan


def show_plan(steps: Plan, json: bool) -> None:
    """The plan as text, or all of it as JSON."""
    figures = {
        "coverage": steps.coverage,
        "true_bits_per_weight": steps.true_bits_per_weight,
        "n_bytes_before": steps.n_bytes_before,
        "n_bytes_after": steps.n_bytes_after,
        "kept": steps.kept,
        "warnings": steps.warnings(),
    }
    if json:
        tables = {"plan": plan_table(steps), "parameters": share_table(steps.shares())}
        terminal.show({**tables, **figures}, json)
    else:
        terminal.out.print(str(steps), highlight=False, markup=False)


def show_model(
    model: PreTrainedModel,
    folder: Path,
    json: bool,
    *,
    tables: dict[str, Table],
    figures: dict[str, Any] | None = None,
) -> None:
    """What a packed model weighs and how it was made, after the tables."""
    size = model_size(model)
    n_bytes = disk_bytes(folder) if folder.is_dir() else None
    metadata = model.config.quantization_config.metadata
    figures = figures or {}
    content = {
        **tables,
        "true_bits_per_weight": size.bits_per_weight,
        "disk_bits_per_weight": size.disk_bits_per_weight,
        "bits_per_parameter": size.bits_per_parameter,
        "coverage": size.coverage,
        "n_bytes_on_disk": n_bytes,
        "metadata": metadata,
        **figures,
    }
    on_disk = "" if n_bytes is None else f"; {n_bytes / 1e6:.1f} MB in {folder}"
    fewer = f" ({size.disk_bits_per_weight:.3f} on disk)" if size.disk_bits != size.quantized_bits else ""
    covered = f"in {size.n_quantized_layers} layers with {size.coverage:.1%} of all parameters"
    lines = [
        f"{size.bits_per_weight:.3f} true bits per weight{fewer} {covered}; "
        f"{size.bits_per_parameter:.3f} bits per parameter of everything{on_disk}",
        *(f"{key}: {value}" for key, value in metadata.items()),
    ]
    if "round_trip" in figures:
        found = figures["round_trip"]
        said = (
            "the same logits bit by bit"
            if found["is_identical"]
            else f"logits within {found['max_difference']:.3g}"
        )
        lines.append(f"loaded again in a fresh process: {said}; {found['question']!r}: {found['answer']!r}")
    if "pushed" in figures:
        lines.append(f"pushed: {figures['pushed']}")
    terminal.show(content, json, lines=lines)
