"""The packed kernels on one GPU, against the GPU's ceilings and against others: one JSON, nothing new after 450 s.

    python -m vlmq.eval.bench_gpu --out results.json
    python -m vlmq.eval.bench_gpu --dry-run         # the list of measurements and their bytes, without a GPU

Ceilings: device copy, bf16 matmul, the smallest kernel in a CUDA graph. Then each layer at 1 and 16 tokens (decode) and
at 2048 and 4096 (prefill), each as torch bf16, torch's own int4 operator and vlmq's formats, with 16-bit and 8-bit
activations; and queries, keys and values of Qwen2.5-VL-7B in one launch and in three. Each figure is the median of
replays of a CUDA graph that reads weights in turn, COLD_BYTES of them, so that none is found in the L2 cache; the
spread is (fastest, slowest). `share` is bytes over seconds over the copy ceiling in decode, operations over seconds
over the matmul ceiling in prefill. Before it is timed, each vlmq kernel is compared with the reference. Then
bitsandbytes, GPTQModel and GemLite, where they are installed, for PEER_SECONDS at most (`vlmq.eval.bench_gpu_peers`),
and whole models (`vlmq.eval.bench_gpu_models`), each in a process of its own: what those leave of LIMIT_SECONDS, at
least LIMIT_SECONDS - KERNEL_SECONDS - PEER_SECONDS.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlmq.eval import bench_gpu_peers
from vlmq.eval.bench_gpu_layers import DECODE_TOKENS, Case, calls_of, plan
from vlmq.eval.bench_gpu_models import MODES, ModelJob, plan_models, run_models
from vlmq.eval.bench_gpu_peers import run_peers
from vlmq.eval.smollm2 import commit

KERNEL_SECONDS = 150.0
PEER_SECONDS = 90.0
LIMIT_SECONDS = 450.0


def check_gpu() -> None:
    """Refuse to begin where there is nothing to measure.

    Raises:
        ValueError: torch finds no CUDA GPU, or triton is missing.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"this measures a CUDA GPU, and torch {torch.__version__} finds none here; run it where the GPU is "
            "(--dry-run lists the measurements)"
        )
    if find_spec("triton") is None:
        raise ValueError("this measures Triton kernels, and triton is not installed; pip install triton")


def ceilings() -> dict[str, float]:
    """Bytes copied (read and written) per second, bf16 matmul operations per second, seconds of the smallest kernel."""
    from vlmq.kernels.triton_tune import graph_seconds

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cell = torch.zeros(1, device="cuda")
    return {
        "copy_bytes_per_second": 2 * source.numel() / graph_seconds([lambda: target.copy_(source)]),
        "matmul_operations_per_second": 2 * 8192**3 / graph_seconds([lambda: torch.mm(a, b)]),
        "smallest_kernel_seconds": graph_seconds([lambda: cell.add_(1)] * 100),
    }


def measure(case: Case, limits: dict[str, float]) -> dict[str, Any]:
    """Time a case; returns its line of the results."""
    from vlmq.kernels.triton_tune import replay_seconds

    seconds = replay_seconds(calls_of(case))
    line = {"bytes": case.bytes_read, "seconds": median(seconds), "spread": [seconds[0], seconds[-1]]}
    return with_share(asdict(case) | line, limits)


def with_share(line: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """Add to a line its share of the ceiling: of bytes per second in decode, of operations in prefill."""
    if line["n_tokens"] in DECODE_TOKENS:
        share = line["bytes"] / line["seconds"] / limits["copy_bytes_per_second"]
    else:
        operations = 2 * line["n_tokens"] * line["in_features"] * line["out_features"]
        share = operations / line["seconds"] / limits["matmul_operations_per_second"]
    return line | {"share": round(share, 4)}


def with_ratios(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each line how many times as fast as torch bf16 of the same size it is; None where that is missing."""

    def size(line: dict[str, Any]) -> tuple[int, int, int]:
        return line["in_features"], line["out_features"], line["n_tokens"]

    dense = {size(line): line["seconds"] for line in lines if line["kernel"] == "torch-bf16"}
    return [
        line | {"over_bf16": round(dense[size(line)] / line["seconds"], 3) if size(line) in dense else None}
        for line in lines
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure what the time allows and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"))
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        for line in dry_run():
            print(json.dumps(line))
        return
    try:
        check_gpu()
    except ValueError as error:
        parser.error(str(error))
    result = bench_gpu(arguments.out, report=lambda line: print(line, flush=True))
    n_failed = len(result["failed"]) + len(result["models"]["failed"])
    if n_failed:
        parser.exit(1, f"{n_failed} measurements failed, see {arguments.out}\n")


def dry_run() -> list[dict[str, Any]]:
    """Return what would be measured, with its bytes and operations; needs no GPU."""
    cases = plan()
    kernels = [asdict(case) | {"bytes": case.bytes_read, "operations": case.operations} for case in cases]
    others = [line for name in bench_gpu_peers.NAMES for line in bench_gpu_peers.list_peer(name)]
    return kernels + others + [asdict(job) | {"mode": mode} for job in plan_models() for mode in MODES]


def bench_gpu(out: Path | None, *, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure all that the time allows on the current GPU; see `run_all`."""
    check_gpu()
    device = f"cuda:{torch.cuda.current_device()}"
    jobs = [replace(job, device=device) for job in plan_models()]
    with torch.inference_mode():
        return run_all(plan(), jobs, out, report=report)


def run_all(
    cases: list[Case],
    jobs: list[ModelJob],
    out: Path | None,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what the time allows; what fails is kept with its message, and the others go on.

    The file is written after every case and model, so that a run that is cut leaves what it has measured.
    """
    from triton.errors import TritonError

    started = time.monotonic()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": "python -m vlmq.eval.bench_gpu",
        "ceilings": ceilings(),
        "measurements": [],
        "failed": [],
        "skipped_for_time": [],
        "peers": {"failed": [], "skipped_for_time": [], "not_installed": []},
        "models": {"models": [], "failed": [], "skipped_for_time": []},
    }
    limits = result["ceilings"]

    def save(key: str, value: object) -> None:
        result[key] = value
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n")

    lines: list[dict[str, Any]] = []
    for case in cases:
        if time.monotonic() - started > KERNEL_SECONDS:
            result["skipped_for_time"].append(asdict(case))
            continue
        try:
            lines.append(measure(case, limits))
            report(json.dumps(lines[-1]))
        except (RuntimeError, ValueError, TypeError, AttributeError, TritonError) as error:
            result["failed"].append(asdict(case) | {"error": f"{type(error).__name__}: {error}"})
            report(json.dumps(result["failed"][-1]))
        torch.cuda.empty_cache()
        save("measurements", with_ratios(lines))
    left = min(PEER_SECONDS, KERNEL_SECONDS + PEER_SECONDS - (time.monotonic() - started))
    found, missing = run_peers(left, jobs[0].device, report=report)
    result["peers"] = missing
    save("measurements", with_ratios(lines + [with_share(line, limits) for line in found]))
    seconds, bandwidth = LIMIT_SECONDS - (time.monotonic() - started), limits["copy_bytes_per_second"]
    run_models(jobs, seconds, bandwidth, report=report, save=lambda models: save("models", models))
    return result


if __name__ == "__main__":
    main()
