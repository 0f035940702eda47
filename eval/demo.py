"""The main job on real input: quantize the small model that ships with vlmq, and show what it cost.

The model is quantized to each width on the shipped calibration rows, its tokens weighted by what an error in
them costs the answers; it is saved, dropped, and reloaded from disk; the logits after the reload must equal
those before it bit by bit. Each is then asked the shipped test questions. Written are a table (demo.md,
demo.json) and a picture (demo.png); the checkpoints stay beside them. Needs no network.
"""

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vlmq import checkpoint
from vlmq.calib.calibration_set import CalibrationSet
from vlmq.calib.data import load
from vlmq.eval.agreement import forward_logits
from vlmq.eval.easy_vqa_data import demo_model_path, load_shapes
from vlmq.eval.picture import Answers, Example, draw
from vlmq.eval.report import Column, Table, as_json, as_markdown
from vlmq.eval.size import disk_bytes, model_size
from vlmq.eval.token_map import token_map
from vlmq.eval.vqa import VqaResult, VqaRow, answer_accuracy
from vlmq.progress import Progress
from vlmq.quantization import quantize

logger = logging.getLogger(__name__)

SCHEMES = ("int4-g64", "int2-g64", "ternary-g64", "binary-g64")
SALIENCY = "loss_grad"  # the calibration rows hold the answers
COLUMNS = (
    Column("model", "Model"),
    Column("accuracy", "Test accuracy", ".1%"),
    Column("answer_nll", "Answer NLL", ".4f"),
    Column("bits_per_weight", "True bits per weight", ".2f"),
    Column("megabytes", "Size on disk (MB)", ".2f"),
    Column("seconds", "Seconds to quantize", ".1f"),
)
FIRST, WRONG = "the first test questions", "a quantized model alone is wrong"


@dataclass(frozen=True)
class Width:
    """One model of the demo; `bits_per_weight` of the original is that of its dtype, `seconds` None."""

    name: str
    result: VqaResult
    bits_per_weight: float
    n_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Demo:
    """What `run_demo` wrote: the table, the files, and the folder of each checkpoint by scheme."""

    table: Table
    files: tuple[Path, ...]
    checkpoints: dict[str, Path]


def run_demo(
    out: str | Path,
    *,
    schemes: Sequence[str] = SCHEMES,
    n_calibration: int = 128,
    n_questions: int | None = None,
    n_examples: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    model_path: str | Path | None = None,
) -> Demo:
    """Quantize, save, reload, ask, and write the report.

    Args:
        out: folder to write to; made if it is not there, its files of an earlier demo are replaced.
        schemes: the widths.
        n_calibration: calibration rows.
        n_questions: test questions; None asks all that ship.
        n_examples: questions in the picture, up to half of them such that a quantized model alone is wrong.
        seed: of quantization and of the sample of calibration rows.
        progress: told about every layer.
        model_path: another model that answers questions about the shapes; None is the shipped one.

    Raises:
        RuntimeError: a reloaded model's logits differ from those before it was saved.
    """
    folder, path = Path(out), Path(model_path or demo_model_path())
    folder.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        return _run(folder, path, schemes, n_calibration, n_questions, n_examples, seed, progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: in matrices as small as these, threads mostly wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _run(
    folder: Path,
    path: Path,
    schemes: Sequence[str],
    n_calibration: int,
    n_questions: int | None,
    n_examples: int,
    seed: int,
    progress: Progress | None,
) -> Demo:
    processor = AutoProcessor.from_pretrained(path)
    rows = load_shapes("test", n_rows=n_questions)
    calibration = load(
        load_shapes("calibration"), processor, n_samples=n_calibration, batch_size=16, seed=seed
    )

    original = AutoModelForImageTextToText.from_pretrained(path).eval()
    bits = 8.0 * original.dtype.itemsize
    widths = [Width("original", answer_accuracy(original, processor, rows), bits, disk_bytes(path), None)]
    logger.info("original: %.1f %% of %d questions right", 100 * widths[0].result.accuracy, len(rows))
    checkpoints = {scheme: folder / scheme for scheme in schemes}
    for scheme, target in checkpoints.items():
        seconds = _quantize_and_save(path, target, processor, calibration, scheme, seed, progress)
        model = checkpoint.load(target)
        size = model_size(model)
        result = answer_accuracy(model, processor, rows)
        widths.append(Width(scheme, result, size.bits_per_weight, disk_bytes(target), seconds))
        done = f"quantized in {seconds:.1f} s, saved, reloaded with the same logits bit by bit"
        logger.info("%s: %s, %.1f %% right", scheme, done, 100 * result.accuracy)

    table = _table(widths, len(rows))
    chosen = choose_examples(widths, n_examples)
    examples = [_example(original, processor, rows[i], group) for i, group in chosen]
    files = (folder / "demo.png", folder / "demo.md", folder / "demo.json")
    n_millions = model_size(original).n_parameters / 1e6
    subtitle = (
        f"{path.name}, {n_millions:.1f} million parameters · {len(rows)} test questions of easy-vqa · "
        f"calibrated on {calibration.n_rows} others · every model reloaded from disk"
    )
    draw(
        files[0],
        "A vision-language model, before and after quantization",
        subtitle,
        examples,
        _rows(widths, chosen),
    )
    files[1].write_text(f"# {table.title}\n\n{as_markdown(table)}")
    settings = {"seed": seed, "calibration": calibration.description, "n_questions": len(rows)}
    files[2].write_text(as_json({"models": table, **settings, "versions": _versions()}))
    return Demo(table, files, checkpoints)


def _quantize_and_save(
    path: Path,
    target: Path,
    processor: Any,
    calibration: CalibrationSet,
    scheme: str,
    seed: int,
    progress: Progress | None,
) -> float:
    """Quantize a fresh copy of the model, save it, and see that what was written gives the same logits.

    Returns:
        Seconds that quantizing took.
    """
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    started = time.perf_counter()
    quantize(model, calibration, scheme, saliency=SALIENCY, seed=seed, progress=progress)
    seconds = time.perf_counter() - started
    checkpoint.save(model, target, processor)
    inputs = calibration[0].inputs
    if not torch.equal(forward_logits(model, inputs), forward_logits(checkpoint.load(target), inputs)):
        raise RuntimeError(f"{scheme}: the logits after reloading {target} differ from those before saving")
    return seconds


def choose_examples(widths: Sequence[Width], n_examples: int) -> list[tuple[int, str]]:
    """Questions for the picture, by a rule that is the same for every run.

    Args:
        widths: the original first.
        n_examples: questions in all.

    Returns:
        (place of the question, group): the first questions, then, up to half of all, the first others that the
        original answers rightly and some width does not.
    """
    original = widths[0].result
    is_lost = [
        original.is_right[i] and not all(width.result.is_right[i] for width in widths)
        for i in range(original.n_questions)
    ]
    n_wrong = min(sum(is_lost[n_examples:]), n_examples // 2)
    n_first = min(n_examples - n_wrong, original.n_questions)
    wrong = [(i, WRONG) for i in range(n_first, original.n_questions) if is_lost[i]]
    return [(i, FIRST) for i in range(n_first)] + wrong[:n_wrong]


def _example(model: PreTrainedModel, processor: Any, row: VqaRow, group: str) -> Example:
    return Example(row["image"], row["question"], row["answer"], token_map(model, processor, row), group)


def _rows(widths: Sequence[Width], chosen: Sequence[tuple[int, str]]) -> list[Answers]:
    rows = []
    for width in widths:
        figures = f"{width.bits_per_weight:.2f} bits · {width.n_bytes / 1e6:.1f} MB"
        answers = tuple(width.result.answers[i] for i, _ in chosen)
        is_right = tuple(width.result.is_right[i] for i, _ in chosen)
        rows.append(Answers(width.name, f"{figures} · {width.result.accuracy:.1%} right", answers, is_right))
    return rows


def _table(widths: Sequence[Width], n_questions: int) -> Table:
    rows = [
        (w.name, w.result.accuracy, w.result.answer_nll, w.bits_per_weight, w.n_bytes / 1e6, w.seconds)
        for w in widths
    ]
    return Table(f"{n_questions} test questions, before and after quantization", COLUMNS, tuple(rows))


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
