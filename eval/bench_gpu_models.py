"""Whole models of random weights on one GPU: greedy decoding of one prompt with a static cache and CUDA graphs.

    python -m vlmq.eval.bench_gpu_models '{"preset": "qwen2.5-vl-7b", "scheme": "int4-g128"}'

measures one model and prints a line of JSON for each way of decoding as soon as it is known: "graph", the step as it
is, captured, and "compiled graph", the step compiled by torch and then captured. `vlmq.eval.bench_gpu` starts such a
process for each model, with a limit of time: what was printed before it was cut counts, no model profits from what
another has loaded, and a kernel that fails takes no other measurement with it.

`first_token` is the time of the prompt and the choice of the first token, not captured; `share` is the bytes that a
token must read (all weights that its step runs, and the cache) over its seconds and the copy ceiling; `same_tokens`
says whether the tokens are those of the same steps without a graph.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vlmq.eval.bench_models import prompt
from vlmq.eval.generation import peak_bytes
from vlmq.eval.presets import PRESETS, build_preset
from vlmq.eval.size import model_size
from vlmq.eval.static_decode import StaticDecoder, Step, capture, decode
from vlmq.kernels.backends import environment_with

N_CHECKED = 16
MODES = ("graph", "compiled graph")


@dataclass(frozen=True)
class ModelJob:
    """One model: a preset, packed to a scheme or not, and the backend it must take; None leaves the choice."""

    preset: str
    scheme: str | None = None
    backend: str | None = None
    device: str = "cuda"
    n_prompt: int = 512
    n_new: int = 128
    n_runs: int = 5


def plan_models() -> list[ModelJob]:
    """The models of the GPU goals, bf16 first: the others are compared with it."""
    name = "qwen2.5-vl-7b"
    return [
        ModelJob(name),
        ModelJob(name, "int4-g128"),
        ModelJob(name, "ternary-channel"),
        ModelJob(name, "ternary-channel", "triton-a8"),
    ]


def measure(
    job: ModelJob,
    *,
    capture: Callable[[Step], Step] = capture,
    compiler: str = "inductor",
) -> Iterator[dict[str, Any]]:
    """Build the model and yield a record for each way of decoding.

    Args:
        capture: what makes a step one launch; anything but a CUDA graph is for tests.
        compiler: backend of torch.compile.

    Raises:
        ValueError: an unknown preset, or too few tokens or runs.
    """
    if job.preset not in PRESETS or job.n_new < 2 or job.n_runs < 1 or job.n_prompt < 1:
        raise ValueError(
            f"expected one of {', '.join(PRESETS)}, at least 2 new tokens, 1 run and 1 token of prompt, got {job}"
        )
    device = torch.device(job.device)
    model = build_preset(job.preset, job.scheme, device=job.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        ids = prompt(model, None, job.n_prompt)["input_ids"]
        decoder = StaticDecoder(model, job.n_prompt + job.n_new)
        first = [_first_token_seconds(decoder, ids) for _ in range(job.n_runs + 1)][1:]
        known = asdict(job) | {
            "first_token": median(first),
            "weight_megabytes": model_size(model).total_bits / 8e6,
            "bytes_per_token": bytes_per_token(decoder),
        }
        n_checked = min(N_CHECKED, job.n_new)
        plain = decode(decoder, decoder.step, ids, n_checked, clock=_clock_of(device)).tokens
        for mode in MODES:
            decoder.prefill(ids)
            step = capture(decoder.step if mode == "graph" else decoder.compiled(compiler))
            runs = [decode(decoder, step, ids, job.n_new, clock=_clock_of(device)) for _ in range(job.n_runs)]
            speeds = sorted((job.n_new - 1) / run.seconds for run in runs)
            yield known | {
                "mode": mode,
                "tokens_per_second": median(speeds),
                "spread": [speeds[0], speeds[-1]],
                "peak_megabytes": peak_bytes(device) / 1e6,
                "same_tokens": all(run.tokens[:n_checked] == plain for run in runs),
            }


def bytes_per_token(decoder: StaticDecoder) -> int:
    """Bytes of the weights that a step runs, and of the cache, which it reads whole; for after a prefill."""
    seen: dict[int, int] = {}

    def note(module: nn.Module, *_: object) -> None:
        if not isinstance(module, nn.Embedding):  # of which it reads a row
            seen.update({id(p): p.nbytes for p in module.parameters(recurse=False)})

    hooks = [module.register_forward_hook(note) for module in decoder.model.modules()]
    try:
        decoder.step()
    finally:
        for hook in hooks:
            hook.remove()
    cache = sum(getattr(layer, part).nbytes for layer in decoder.cache.layers for part in ("keys", "values"))
    return sum(seen.values()) + cache


def run_models(
    jobs: Sequence[ModelJob],
    seconds: float,
    bandwidth: float,
    *,
    command: Sequence[str] = (sys.executable, "-m", "vlmq.eval.bench_gpu_models"),
    report: Callable[[str], None] = lambda _: None,
    save: Callable[[dict[str, list[dict[str, Any]]]], None] = lambda _: None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure each model in a process of its own; none takes more than its share of the seconds that are left.

    Args:
        bandwidth: bytes per second that the GPU copies, for the share.
        command: what is started, with the job as JSON after it.
        save: told the result so far after each model.

    Returns:
        `models`, `failed` and `skipped_for_time`: the modes that a job had no time for.
    """
    end = time.monotonic() + seconds
    result: dict[str, list[dict[str, Any]]] = {"models": [], "failed": [], "skipped_for_time": []}
    for number, job in enumerate(jobs):
        left = (end - time.monotonic()) / (len(jobs) - number)
        lines, error = _run_job(job, left, command) if left > 0 else ([], None)
        for line in lines:
            share = line["bytes_per_token"] * line["tokens_per_second"] / bandwidth
            result["models"].append(line | {"share": round(share, 4)})
            report(json.dumps(result["models"][-1]))
        if error is not None:
            result["failed"].append(asdict(job) | {"error": error})
            report(json.dumps(result["failed"][-1]))
        else:
            missing = [mode for mode in MODES if mode not in {line["mode"] for line in lines}]
            result["skipped_for_time"] += [asdict(job) | {"mode": mode} for mode in missing]
        result["models"] = _with_ratios(result["models"])
        save(result)
    return result


def _run_job(
    job: ModelJob, seconds: float, command: Sequence[str]
) -> tuple[list[dict[str, Any]], str | None]:
    environment = None if job.backend is None else environment_with(job.backend)
    return run_lines([*command, json.dumps(asdict(job))], seconds, environment=environment)


def run_lines(
    command: Sequence[str], seconds: float, *, environment: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str | None]:
    """Run a process for a time at most: its lines of JSON, and how it failed; running out of time is no failure."""
    error = None
    # Files, not pipes: a process that the child leaves behind would keep a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            done = subprocess.run(
                command, stdout=out, stderr=err, timeout=seconds, check=False, env=environment
            )
        except subprocess.TimeoutExpired:
            code = 0
        else:
            code = done.returncode
        out.seek(0)
        err.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
        if code != 0:
            said = [line.strip() for line in err if line.strip()]
            error = said[-1] if said else f"exit code {code}"
    return lines, error


def _with_ratios(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add how many times as fast as bf16 decoded the same way each is; None where that is missing."""
    dense = {line["mode"]: line["tokens_per_second"] for line in lines if line["scheme"] is None}
    return [
        line
        | {
            "over_bf16": round(line["tokens_per_second"] / dense[line["mode"]], 3)
            if line["mode"] in dense
            else None
        }
        for line in lines
    ]


def _first_token_seconds(decoder: StaticDecoder, ids: Tensor) -> float:
    started = time.perf_counter()
    decoder.prefill(ids).item()  # waits for the device
    return time.perf_counter() - started


def _clock_of(device: torch.device) -> Callable[[], float]:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def main() -> None:
    """Measure the model that the JSON in the first argument describes."""
    job = ModelJob(**json.loads(sys.argv[1]))
    if not torch.cuda.is_available():
        raise ValueError(f"this measures a CUDA GPU, and torch {torch.__version__} finds none here")
    with torch.cuda.device(job.device):
        for record in measure(job):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
