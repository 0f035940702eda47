"""Whole models: how fast they generate, what they need, and how good they are, each in a process of its own.

No model profits from what another has loaded, and peak memory is that of one model. The models take turns, a run
each, so that what disturbs the machine disturbs all; the ratio to the first model is the median over the turns. Models
that together would fill more than half of the memory are measured one after the other instead.

A model is a folder or a hub name, packed or not, or `preset:NAME` (see `vlmq.eval.presets`), or
`preset:NAME@SCHEME` with its layers packed with random codes, which measures speed and memory only; or what another
package loads, `bitsandbytes:MODEL` and `gptqmodel:MODEL` (see `vlmq.eval.peer_models`).
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from transformers import PreTrainedModel

from vlmq.eval.child import serve, start
from vlmq.eval.easy_vqa_data import load_shapes
from vlmq.eval.generation import generate_once, held_bytes, peak_bytes
from vlmq.eval.peer_models import open_peer, peer_bits, split_peer
from vlmq.eval.perplexity import perplexity, token_windows
from vlmq.eval.presets import PRESETS, build_preset, preset_bytes
from vlmq.eval.report import Column, Table
from vlmq.eval.size import disk_bytes, model_size
from vlmq.eval.vqa import answer_accuracy, encode_questions, load_rows
from vlmq.opening import open_model, open_processor

PRESET = "preset:"
SHAPES = "shapes"
DECODE_TOKENS = 8  # per forward: few enough for the kernels that generate, which may round activations

COLUMNS = (
    Column("model", "Model"),
    Column("tokens_per_second", "Tokens/s", ".1f"),
    Column("range", "Range"),
    Column("speedup", "Ratio", ".2f"),
    Column("first_token", "First token s", ".3f"),
    Column("weight_megabytes", "Weights MB", ".1f"),
    Column("peak_megabytes", "Peak MB", ".0f"),
    Column("megabytes", "Disk MB", ".1f"),
    Column("bits_per_weight", "True bits", ".2f"),
    Column("perplexity", "PPL", ".2f"),
    Column("decode_perplexity", "PPL in decoding", ".2f"),
    Column("accuracy", "Right", ".1%"),
    Column("answer_nll", "NLL", ".4f"),
)


@dataclass(frozen=True)
class Job:
    """One model to measure.

    Attributes:
        model: folder, hub name, or preset.
        device: such as "cuda"; None is the CPU.
        threads: threads of torch on the CPU; None leaves torch's choice.
        n_prompt: tokens of the random prompt; a model with a processor for images is asked about one image instead.
        n_new: tokens generated per run.
        n_runs: counted runs.
        text: a text file or a .pt of token ids (n_rows, length), for perplexity.
        n_windows: windows of the text file.
        vqa: questions for accuracy, see `vlmq.eval.vqa.load_rows`; "shapes" for the test rows that ship with vlmq.
        n_questions: the first questions only; None takes all.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    device: str | None = None
    threads: int | None = None
    n_prompt: int = 64
    n_new: int = 64
    n_runs: int = 5
    text: str | None = None
    n_windows: int | None = None
    vqa: str | None = None
    n_questions: int | None = None
    trust_remote_code: bool = False


def check_job(job: Job) -> None:
    """Find what is wrong with a job before any time is spent.

    Raises:
        ValueError: an unknown preset, counts below their minimum, a missing file, a folder without weights.
    """
    name, _ = _preset_of(job.model)
    if name is not None and name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; known: {' '.join(PRESETS)}")
    _, path = split_peer(job.model)
    if name is None and not Path(path).is_dir() and path.startswith((".", "/", "~")):
        raise ValueError(f"model {job.model!r}: there is no such folder")
    if name is None and Path(path).is_dir():
        disk_bytes(Path(path))  # which refuses a folder without weights
    for path in filter(None, (job.text, job.vqa)):
        if path != SHAPES and not Path(path).is_file():
            raise ValueError(f"there is no file {path!r}")
    if job.n_new < 2 or job.n_runs < 1 or job.n_prompt < 1:
        raise ValueError(
            f"expected at least 2 new tokens, 1 run and 1 token of prompt, got {job.n_new}, {job.n_runs} and "
            f"{job.n_prompt}"
        )


class Measurement:
    """A model that is open in this process."""

    def __init__(self, job: Job) -> None:
        check_job(job)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job = job
        self.device = torch.device(job.device or "cpu")
        self.before = held_bytes(self.device)
        self.model, self.processor = _open(job)
        self.inputs = prompt(self.model, self.processor, job.n_prompt)

    def run(self) -> list[float]:
        """Generate once: seconds to the first token, and from the first to the last."""
        first, decode, _ = generate_once(self.model, self.inputs, self.job.n_new)
        return [first, decode]

    def record(self) -> dict[str, Any]:
        """What does not depend on the clock: memory, size, quality, settings."""
        job, model, device = self.job, self.model, self.device
        peak = peak_bytes(device) - self.before
        size = model_size(model)
        peer, path = split_peer(job.model)
        plain_bits = size.bits_per_weight if size.n_quantized_layers else 8.0 * model.dtype.itemsize
        bits, weight_bytes = (plain_bits, size.total_bits / 8) if peer is None else peer_bits(model)
        record: dict[str, Any] = {
            "model": job.model,
            "n_prompt": int(self.inputs["input_ids"].shape[1]),
            "n_new": job.n_new,
            "weight_megabytes": weight_bytes / 1e6,
            "peak_megabytes": peak / 1e6,
            "megabytes": disk_bytes(Path(path)) / 1e6 if Path(path).is_dir() else None,
            "bits_per_weight": bits,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        if job.text is not None:
            ids = _token_ids(job, self.processor)
            record["perplexity"] = perplexity(model, ids)
            record["decode_perplexity"] = perplexity(model, ids, batch_size=1, chunk=DECODE_TOKENS)
        if job.vqa is not None:
            rows = load_shapes("test") if job.vqa == SHAPES else load_rows(job.vqa)
            result = answer_accuracy(model, self.processor, rows[: job.n_questions])
            record |= {"accuracy": result.accuracy, "answer_nll": result.answer_nll}
        return record


def prompt(model: PreTrainedModel, processor: Any, n_prompt: int) -> dict[str, Any]:
    """Inputs of one prompt on the model's device: a question about an image, or random tokens.

    Args:
        model: the model.
        processor: its own; None, or one without images, gives random tokens.
        n_prompt: number of random tokens.
    """
    if getattr(processor, "image_processor", None) is not None:
        row = {"image": Image.linear_gradient("L").convert("RGB"), "question": "what is in the image?"}
        inputs = encode_questions([row], processor)
        moved = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return {
            k: v.to(model.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in moved.items()
        }
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, n_prompt), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bench_models(
    jobs: Sequence[Job], *, report: Callable[[str], None] = lambda _: None
) -> tuple[Table, list[dict[str, Any]]]:
    """Measure models in turns, each in a process of its own.

    Args:
        jobs: what to measure; the first is the baseline.
        report: told a line before each turn and before what follows them.

    Returns:
        the table, and the records with all settings.

    Raises:
        ValueError: a job is wrong, before the first is started.
        RuntimeError: a process failed; the message holds its last line.
    """
    for job in jobs:
        check_job(job)
    groups = [list(jobs)] if _fit_together(jobs) else [[job] for job in jobs]
    records = [record for group in groups for record in _take_turns(group, report)]
    base = records[0]["speeds"]
    for record in records:
        pairs = zip(record["speeds"], base, strict=False)
        record["speedup"] = statistics.median(own / other for own, other in pairs)
    columns = tuple(c for c in COLUMNS if any(r.get(c.key) is not None for r in records))
    return Table("Generation", columns, tuple(tuple(r.get(c.key) for c in columns) for r in records)), records


def _fit_together(jobs: Sequence[Job]) -> bool:
    """Whether all models may be open at a time: on a CPU, with sizes that are known beforehand."""
    if any(job.device not in (None, "cpu") for job in jobs):
        return False
    n_bytes = [_known_bytes(job.model) for job in jobs]
    return None not in n_bytes and sum(filter(None, n_bytes)) < psutil.virtual_memory().total / 2


def _known_bytes(model: str) -> int | None:
    path = split_peer(model)[1]
    if Path(path).is_dir():
        return disk_bytes(Path(path))
    name, scheme = _preset_of(model)
    return None if name is None else preset_bytes(name, scheme)


def _take_turns(jobs: Sequence[Job], report: Callable[[str], None]) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        children = [
            stack.enter_context(start("vlmq.eval.bench_models", json.dumps(asdict(job)), job.model))
            for job in jobs
        ]
        turns: list[list[list[float]]] = []
        for turn in range(max(job.n_runs for job in jobs) + 1):
            report(f"run {turn} of {jobs[0].n_runs}" if turn else "first run, not counted")
            turns.append([child.ask("run") for child in children])
        records = []
        for child, job, runs in zip(children, jobs, zip(*turns[1:], strict=True), strict=True):
            report(f"size and quality of {job.model}")
            speeds = [(job.n_new - 1) / decode for _, decode in runs]
            records.append(
                {
                    "first_token": statistics.median(first for first, _ in runs),
                    "tokens_per_second": statistics.median(speeds),
                    "range": f"{min(speeds):.0f}-{max(speeds):.0f}",
                    "speeds": speeds,
                    **child.ask("record"),
                }
            )
    return records


def _preset_of(model: str) -> tuple[str | None, str | None]:
    """Name and scheme of a preset; (None, None) for other models."""
    if not model.startswith(PRESET):
        return None, None
    name, _, scheme = model.removeprefix(PRESET).partition("@")
    return name, scheme or None


def _open(job: Job) -> tuple[PreTrainedModel, Any]:
    name, scheme = _preset_of(job.model)
    if name is not None:
        return build_preset(name, scheme, device=job.device or "cpu"), None
    peer, path = split_peer(job.model)
    options = {"device": job.device, "trust_remote_code": job.trust_remote_code}
    model = open_peer(peer, path, job.device or "cpu") if peer else open_model(path, **options)
    try:
        return model, open_processor(path, trust_remote_code=job.trust_remote_code)
    except (OSError, ValueError):
        if job.text is not None and not job.text.endswith(".pt") or job.vqa is not None:
            raise
        return model, None


def _token_ids(job: Job, processor: Any) -> torch.Tensor:
    assert job.text is not None
    if job.text.endswith(".pt"):
        return torch.load(job.text, weights_only=True)[: job.n_windows]
    tokenizer = getattr(processor, "tokenizer", processor)
    return token_windows(Path(job.text).read_text(), tokenizer, n_windows=job.n_windows)


def main() -> None:
    """Answer the parent about the model that the JSON in the first argument describes."""
    measurement = None

    def answer(line: str) -> Any:
        nonlocal measurement
        measurement = measurement or Measurement(replace(Job(""), **json.loads(sys.argv[1])))
        return measurement.run() if line == "run" else measurement.record()

    serve(answer)


if __name__ == "__main__":
    main()
