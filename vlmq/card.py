"""The model card of a saved model: README.md with nothing in it that was not measured.

The card is made from the folder alone: the config (scheme, solver, seed, calibration set, base model), what the
round-trip check found (`vlmq_round_trip.json`) and what was measured before and after (`vlmq_evaluation.json`, see
`keep_evaluation`). What is not there is left out. A card made here carries a mark, and only such a card is replaced.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vlmq.checkpoint import CARD_FILE, CARD_MARK
from vlmq.eval.report import Column, Table, as_json, as_markdown, as_records
from vlmq.eval.round_trip import RoundTrip, load_snippet, read_round_trip

EVALUATION_FILE = "vlmq_evaluation.json"
METRICS = {
    "perplexity": ("text-generation", "perplexity", "Perplexity"),
    "accuracy": ("visual-question-answering", "accuracy", "Exact match"),
    "zero_shot_top1": ("zero-shot-image-classification", "accuracy", "Top-1 accuracy"),
}
PIPELINES = (
    ("ForConditionalGeneration", "image-text-to-text"),
    ("ForImageTextToText", "image-text-to-text"),
    ("ForCausalLM", "text-generation"),
)
DETAILS = ("solver", "options", "saliency", "saliency_options", "alpha", "seed")


def keep_evaluation(folder: Path, table: Table, measured_on: str) -> None:
    """Keep what was measured in the folder, for its card.

    Args:
        folder: of the saved model.
        table: what `vlmq.eval.evaluation.evaluate` gives: rows of the columns `model` ("original", "model"), ...
        measured_on: the data, for people.

    Raises:
        ValueError: no row of the model itself, or no word on the data.
    """
    if "model" not in {record.get("model") for record in as_records(table)}:
        raise ValueError('evaluation: expected a table with a row whose column "model" says "model"')
    if not measured_on.strip():
        raise ValueError("measured_on is missing: say what data the figures are from")
    columns = [[c.key, c.title, c.spec] for c in table.columns]
    text = as_json({"measured_on": measured_on, "columns": columns, "records": table})
    (folder / EVALUATION_FILE).write_text(text + "\n", encoding="utf-8")


def is_own_card(path: Path) -> bool:
    """Whether a card was written here, and may be replaced."""
    return path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")


def write_card(folder: Path, repo_id: str | None = None, *, base_model: str | None = None) -> bool:
    """Write README.md, unless there is one by somebody else.

    Args:
        folder: of the saved model, after its round-trip check.
        repo_id: where it will lie; None calls it by the folder's name.
        base_model: repository of the original, where the config does not know it.

    Returns:
        Whether it was written.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_own_card(path):
        return False
    path.write_text(card_text(folder, repo_id, base_model=base_model), encoding="utf-8")
    return True


def card_text(folder: Path, repo_id: str | None = None, *, base_model: str | None = None) -> str:
    """The card of a folder, arguments as for `write_card`.

    Raises:
        ValueError: the folder has had no round-trip check.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    block = config["quantization_config"]
    metadata = block["metadata"]
    checked = read_round_trip(folder)
    if checked is None:
        raise ValueError(f"{folder} has had no round-trip check: vlmq.push makes it")
    evaluation = _read_evaluation(folder)
    name = repo_id or folder.name
    base = base_model or metadata.get("base_model")
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        pipeline_tag=_pipeline(config),
        tags=["vlmq", "quantized", *sorted({scheme.split("-")[0] for scheme in block["modules"]})],
        model_name=name.split("/")[-1],
        eval_results=_results(evaluation) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n{CARD_MARK}\n\n# {name.split('/')[-1]}",
        _opening(base, config, block),
        _sizes(block, checked),
        _measured(evaluation),
        _load(name, folder, checked),
        _made(metadata, checked, block),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _read_evaluation(folder: Path) -> dict[str, Any] | None:
    path = folder / EVALUATION_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _pipeline(config: Mapping[str, Any]) -> str | None:
    """The hub's name of what the model does, by its class; None where that does not tell."""
    name = (config.get("architectures") or [""])[0]
    if "vision_config" in config and "text_config" in config and name.endswith("Model"):
        return "zero-shot-image-classification"
    return next((task for ending, task in PIPELINES if name.endswith(ending)), None)


def _results(evaluation: dict[str, Any] | None) -> list[EvalResult]:
    """The `model-index`: figures of the quantized model only, of those measures that the hub has names for."""
    if evaluation is None:
        return []
    record = next(r for r in evaluation["records"] if r["model"] == "model")
    return [
        EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=evaluation["measured_on"],
            metric_type=metric,
            metric_name=title,
            metric_value=record[key],
        )
        for key, (task, metric, title) in METRICS.items()
        if record.get(key) is not None
    ]


def _opening(base: str | None, config: Mapping[str, Any], block: Mapping[str, Any]) -> str:
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"A `{config['architectures'][0]}`"
    return f"{origin}, quantized after training with vlmq {block['vlmq_version']}; the layers stay packed in memory."


def _sizes(block: Mapping[str, Any], checked: RoundTrip) -> str:
    size = checked.size
    layers = "\n".join(f"- `{scheme}`: {len(names)} layers" for scheme, names in block["modules"].items())
    bits, on_disk = f"{size['true_bits_per_weight']:.3f}", size.get("disk_bits_per_weight")
    if on_disk not in (None, size["true_bits_per_weight"]):
        bits += f" in memory, {on_disk:.3f} on disk"
    table = Table(
        "",
        (Column("what", ""), Column("before", "Before"), Column("after", "After")),
        (
            (
                "Weights",
                f"{size['n_bytes_before'] / 1e6:,.1f} MB as {size['dtype']}, by the parameters",
                f"{size['n_bytes_on_disk'] / 1e6:,.1f} MB on disk",
            ),
            (
                "Bits per parameter, of everything",
                f"{8 * size['n_bytes_before'] / size['n_parameters']:.2f}",
                f"{size['bits_per_parameter']:.3f}",
            ),
            ("True bits per quantized weight", "", bits),
        ),
    )
    covered = f"{size['coverage']:.1%} of {size['n_parameters']:,} parameters are quantized:"
    return f"## Size\n\n{as_markdown(table)}\n{covered}\n\n{layers}\n\nTrue bits count codes, scales and zero points."


def _measured(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "## Quality\n\nNo quality was measured."
    columns = tuple(Column(*column) for column in evaluation["columns"])
    names = {"original": "before", "model": "this model"}
    rows = tuple(
        tuple(names.get(r[c.key], r[c.key]) if c.key == "model" else r[c.key] for c in columns)
        for r in evaluation["records"]
    )
    table = as_markdown(Table("", columns, rows))
    return f"## Quality, before and after\n\nMeasured on {evaluation['measured_on']}.\n\n{table}".rstrip()


def _load(name: str, folder: Path, checked: RoundTrip) -> str:
    snippet = load_snippet(name, folder, checked.trust_remote_code)
    logits = (
        "the logits are those of the model that was saved, bit by bit"
        if checked.is_identical
        else f"the logits differ by at most {checked.max_difference:.3g} from those of the model that was saved, "
        f"two forwards of which differ by {checked.noise:.3g}"
    )
    said = ""
    if checked.answer is not None:
        same = "as before saving" if checked.is_same_answer else "not word by word as before saving"
        words = " ".join(checked.answer.split())
        said = f" Asked “{checked.question}”, it answers “{words}”, {same}."
    return (
        f"## Load\n\n```python\n{snippet}```\n\n"
        f"These lines were run in a fresh process on the folder that was uploaded: {logits}.{said}"
    )


def _made(metadata: Mapping[str, Any], checked: RoundTrip, block: Mapping[str, Any]) -> str:
    lines = [
        f"- {key.replace('_', ' ')}: {_plain(metadata[key])}"
        for key in DETAILS
        if metadata.get(key) not in (None, {})
    ]
    if metadata.get("calibration_set"):
        lines.append(f"- calibration set: {metadata['calibration_set']}")
    if metadata.get("calibration"):
        lines.append(f"- sha256 of the calibration inputs: `{metadata['calibration']}`")
    used = metadata.get("versions") or {"vlmq": block["vlmq_version"]}
    lines.append(f"- quantized with {_named(used)}")
    lines.append(f"- checked with {_named(checked.versions)}")
    return "## How it was made\n\n" + "\n".join(lines)


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
