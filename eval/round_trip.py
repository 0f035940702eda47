"""The round trip of a saved model: loaded again in a process of its own, it must answer as the model in memory does.

The fresh process runs the very lines that the model card prints, on the folder, then computes the logits of one probe
and generates one answer. Both must be those of the model in memory: bit by bit, or, where two forwards of the same
model differ already (atomic additions on a GPU), by no more than a few times that difference. What came out is kept in
`vlmq_round_trip.json` in the folder, whether the check passed or not.

The weights need no comparison here, since loading compares their checksums (`vlmq.integrity`). What it cannot see is
what a checkpoint does not hold, such as the buffers of rotary embeddings: the message names those that differ.
"""

import json
import math
import platform
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.eval.agreement import forward_logits
from vlmq.eval.probe import Outcome, Probe, answer, make_probe
from vlmq.eval.size import disk_bytes, model_size
from vlmq.integrity import checksum, listing

ROUND_TRIP_FILE = "vlmq_round_trip.json"
NOISE_FACTOR = 4.0
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class RoundTrip:
    """What `check_round_trip` found.

    `max_difference` is the largest absolute difference of two logits, `noise` that of two forwards of the model in
    memory; `problem` says what differed where the check failed. `weights` identifies the checkpoint's checksums.
    """

    is_ok: bool
    is_identical: bool
    max_difference: float | None
    noise: float
    question: str
    answer: str | None
    is_same_answer: bool
    problem: str | None
    weights: str
    trust_remote_code: bool
    size: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def check_round_trip(
    model: PreTrainedModel,
    folder: Path,
    processor: Any = None,
    *,
    row: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> RoundTrip:
    """Load what was saved in a fresh process, compare, and keep the result in the folder.

    The fresh process computes where the model is, with as many threads; so there is room needed for the packed model
    once more.

    Args:
        model: as it was saved.
        folder: where it was saved.
        processor: makes the probe; without one it is a row of token ids.
        row: mapping with "image" and "question" to ask; a generated picture unless told.
        trust_remote_code: run code that comes with the model.

    Raises:
        RuntimeError: the check failed; the message says what differed. The folder is left as it is.
        ValueError: a dual encoder without processor.
    """
    probe = make_probe(model, processor, row)
    was_training = model.training
    model.eval()
    try:
        outcome = answer(model, probe)
        again = forward_logits(model, probe.inputs).cpu()
    finally:
        model.train(was_training)
    noise = _difference(outcome.logits, again)
    found, problem = _load_and_answer(model, folder, probe, trust_remote_code)
    difference = None
    if found is not None:
        difference = _difference(outcome.logits, found["logits"])
        problem = _what_differs(model, outcome, found, difference, noise)
    result = RoundTrip(
        is_ok=problem is None,
        is_identical=difference == 0,
        max_difference=difference if difference is None or math.isfinite(difference) else None,
        noise=noise,
        question=probe.question,
        answer=_decode(processor, outcome.tokens),
        is_same_answer=found is not None and _are_same(outcome.tokens, found["tokens"]),
        problem=problem,
        weights=weights_id(folder),
        trust_remote_code=trust_remote_code,
        size=_size(model, folder),
        versions=versions(),
    )
    text = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    (folder / ROUND_TRIP_FILE).write_text(text + "\n", encoding="utf-8")
    if problem is not None:
        raise RuntimeError(
            f"round-trip check of {folder} failed: {problem}; the folder is left for inspection"
        )
    return result


def read_round_trip(folder: Path) -> RoundTrip | None:
    """The result that the folder keeps, None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / ROUND_TRIP_FILE
    if not path.is_file():
        return None
    try:
        return RoundTrip(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the check is made again") from error


def weights_id(folder: Path) -> str:
    """Eight hex digits that change with any tensor of a checkpoint: the CRC-32 of its checksums."""
    block = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return f"{zlib.crc32(json.dumps(block['checksums'], sort_keys=True).encode()):08x}"


def load_snippet(name: str, folder: Path, trust_remote_code: bool = False) -> str:
    """The lines that load the model of a folder under a name: a repository, or the folder itself."""
    trust = ", trust_remote_code=True" if trust_remote_code else ""
    lines = ["import vlmq  # transformers by itself refuses the checkpoint"]
    has_processor = any((folder / file).is_file() for file in PROCESSOR_FILES)
    if has_processor:
        lines += ["from transformers import AutoProcessor"]
    lines += ["", f"model = vlmq.load({json.dumps(name)}{trust})"]
    if has_processor:
        lines += [f"processor = AutoProcessor.from_pretrained({json.dumps(name)}{trust})"]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    names = ("vlmq", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def main(work: Path) -> None:
    """What the fresh process does: run the snippet, answer the probe, write both down."""
    job = torch.load(work / "job.pt", weights_only=True)
    torch.set_num_threads(job["n_threads"])
    names: dict[str, Any] = {}
    exec(compile(job["snippet"], "snippet", "exec"), names)
    model = names["model"].to(job["device"])
    outcome = answer(model, Probe("", job["inputs"]))
    found = {"logits": outcome.logits, "tokens": outcome.tokens, "buffers": _buffers(model)}
    torch.save(found, work / "found.pt")


def _load_and_answer(
    model: PreTrainedModel, folder: Path, probe: Probe, trust_remote_code: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """What the fresh process found, or why it found nothing."""
    job = {
        "snippet": load_snippet(str(folder), folder, trust_remote_code),
        "inputs": probe.inputs,
        "device": str(model.device),
        "n_threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="vlmq-") as work:
        torch.save(job, Path(work) / "job.pt")
        run = _run_fresh(work)
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            return None, f"a fresh process cannot load it ({lines[-1]})"
        return torch.load(Path(work) / "found.pt", weights_only=True), None


def _run_fresh(work: str) -> subprocess.CompletedProcess[str]:
    code = "import sys, pathlib; from vlmq.eval.round_trip import main; main(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-P", "-c", code, work]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _what_differs(
    model: PreTrainedModel, outcome: Outcome, found: dict[str, Any], difference: float, noise: float
) -> str | None:
    if difference <= NOISE_FACTOR * noise:
        is_excused = noise > 0 or _are_same(outcome.tokens, found["tokens"])
        return None if is_excused else "the logits are the same, the generated answer is another one"
    problem = f"logits differ by up to {difference:.3g} from those of the model that was saved"
    here, there = _buffers(model), found["buffers"]
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if names:
        problem += (
            f"; of what a checkpoint does not hold, these differ: {listing(names)} (a model that was cast with "
            ".to(dtype) rounds them: load it in that dtype instead)"
        )
    return problem


def _buffers(model: PreTrainedModel) -> dict[str, str]:
    """Checksums of the buffers that are not saved."""
    saved = model.state_dict().keys()
    return {n: checksum([(n, b)]) for n, b in model.named_buffers() if n not in saved}


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; 0 only where all bits are the same, infinite where shapes differ or one is NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(_bits(a), _bits(b)):
        return 0.0
    worst = float((a.double() - b.double()).abs().nan_to_num(float("inf"), float("inf")).max())
    return max(worst, sys.float_info.min)  # 0 and -0 differ in their bits


def _bits(a: Tensor) -> Tensor:
    return a.contiguous().reshape(-1).view(torch.uint8)


def _are_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _decode(processor: Any, tokens: Tensor | None) -> str | None:
    if tokens is None:
        return None
    if not hasattr(processor, "batch_decode"):
        return " ".join(map(str, tokens[0].tolist()))
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def _size(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    size = model_size(model)
    return {
        "n_parameters": size.n_parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "n_bytes_before": size.n_parameters * model.dtype.itemsize,
        "n_bytes_on_disk": disk_bytes(folder),
        "true_bits_per_weight": size.bits_per_weight,
        "disk_bits_per_weight": size.disk_bits_per_weight,
        "bits_per_parameter": size.bits_per_parameter,
        "coverage": size.coverage,
    }
