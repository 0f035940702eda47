"""Layers of other packages on one GPU: each package in a process of its own, which ends when its time is over.

    python -m vlmq.eval.bench_gpu_peers GPTQModel [DEVICE]

prints a line of JSON for each measurement as soon as it is known, without a limit of time: a package that compiles its
kernels at their first use, for minutes, has them from then on. `vlmq.eval.bench_gpu` starts such a process for each
package that is installed. What a package refuses is a line with its message; a process that ends takes no other
measurement with it.

Timed as in `vlmq.eval.bench_gpu`: replays of a CUDA graph over copies of the weight. `error` is relative to float64
with the weights that the layer holds.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from vlmq.eval import peers
from vlmq.eval.bench_gpu_models import run_lines
from vlmq.eval.peers import GPU_ROWS, Row

SIZES = ((4096, 14336), (4096, 4096))
"""(in_features, out_features), the most wanted first."""

TOKENS = (1, 16, 2048)
N_CHECKED = 16
NAMES = tuple(dict.fromkeys(row.peer for row in GPU_ROWS))
Measured = dict[str, Any]


def size_of(row: Row, in_features: int, out_features: int, n_tokens: int) -> Measured:
    """What is measured, in the words of `vlmq.eval.bench_gpu.Case`."""
    name, _, group = row.scheme.partition("-g")
    backend = "" if row.backend == "auto" else f" {row.backend}"
    return {
        "kernel": f"{row.peer}{backend}",
        "format_name": name,
        "group_size": int(group),
        "in_features": in_features,
        "out_features": out_features,
        "n_tokens": n_tokens,
    }


def plan_peer(name: str) -> list[tuple[Row, int, int]]:
    """Layers of one package: row, in_features, out_features."""
    return [(row, *size) for size in SIZES for row in GPU_ROWS if row.peer == name]


def list_peer(name: str) -> list[Measured]:
    """What would be measured of a package, and why it would not; needs no GPU."""
    reason = peers.why_not(name)
    note = {} if reason is None else {"not_run": reason}
    return [size_of(*part, n_tokens) | note for part in plan_peer(name) for n_tokens in TOKENS]


def measure(
    row: Row,
    in_features: int,
    out_features: int,
    device: str,
    *,
    tokens: Sequence[int] = TOKENS,
    replay: Callable[[list[Callable[[], object]]], list[float]] | None = None,
) -> Iterator[Measured]:
    """Make one layer and yield a line for each number of tokens: its seconds, or the error that it raised.

    Args:
        replay: what times the calls; anything but a CUDA graph is for tests.
    """
    from triton.errors import TritonError

    from vlmq.kernels.triton_tune import COLD_BYTES, replay_seconds

    weight = torch.randn(out_features, in_features, device=device, dtype=torch.bfloat16) / in_features**0.5
    n_copies = max(3, COLD_BYTES // (in_features * out_features * row.bits // 8))
    layer = None
    for n_tokens in tokens:
        size = size_of(row, in_features, out_features, n_tokens)
        x = torch.randn(n_tokens, in_features, device=device, dtype=torch.bfloat16)
        try:
            layer = layer or peers.build(row, weight, n_copies)
            error = peers.error_of(layer, x[:N_CHECKED])
            seconds = (replay or replay_seconds)([lambda call=call, x=x: call(x) for call in layer.calls])
        except (*peers.FAILURES, TritonError) as why:
            said = str(why).strip().splitlines() or [""]
            yield size | {"failed": f"{type(why).__name__}: {said[0]}"}
            if layer is None:
                return
            continue
        yield size | {
            "path": layer.path,
            "version": peers.version_of(row.peer),
            "bits_per_weight": 8 * layer.n_bytes / weight.numel(),
            "bytes": layer.n_bytes + 2 * n_tokens * (in_features + out_features),
            "error": error,
            "seconds": median(seconds),
            "spread": [seconds[0], seconds[-1]],
        }


def run_peers(
    seconds: float,
    device: str,
    *,
    command: Sequence[str] = (sys.executable, "-m", "vlmq.eval.bench_gpu_peers"),
    report: Callable[[str], None] = lambda _: None,
) -> tuple[list[Measured], dict[str, list[Measured]]]:
    """Measure each package that is installed; none takes more than its share of the seconds that are left.

    Args:
        command: what is started, with the package and the device after it.

    Returns:
        the lines that were measured; and what was not: `failed`, `skipped_for_time`, `not_installed`.
    """
    lines: list[Measured] = []
    missing: dict[str, list[Measured]] = {"failed": [], "skipped_for_time": [], "not_installed": []}
    reasons = {name: peers.why_not(name) for name in NAMES}
    missing["not_installed"] = [
        {"kernel": name, "error": reason} for name, reason in reasons.items() if reason is not None
    ]
    installed = [name for name in NAMES if reasons[name] is None]
    end = time.monotonic() + seconds
    for number, name in enumerate(installed):
        left = (end - time.monotonic()) / (len(installed) - number)
        found, error = run_lines([*command, name, device], left) if left > 0 else ([], None)
        lines += [line for line in found if "failed" not in line]
        missing["failed"] += [{**line, "error": line["failed"]} for line in found if "failed" in line]
        if error is not None:
            missing["failed"].append({"kernel": name, "error": error})
        else:
            missing["skipped_for_time"] += _not_reached(name, found)
        for line in found:
            report(json.dumps(line))
    return lines, missing


def _not_reached(name: str, found: list[Measured]) -> list[Measured]:
    """Layers and tokens of a package after its last line; those after a layer that cannot be made are not missed."""
    planned = [size_of(*part, n_tokens) for part in plan_peer(name) for n_tokens in TOKENS]
    if not found:
        return planned
    last = {key: found[-1][key] for key in planned[0]}
    if "failed" in found[-1]:
        last["n_tokens"] = TOKENS[-1]
    return planned[planned.index(last) + 1 :]


def main() -> None:
    """Measure the package that the first argument names, on the device that the second names."""
    name, *rest = sys.argv[1:] or [""]
    if name not in NAMES:
        raise SystemExit(f"expected one of {', '.join(NAMES)}, got {name!r}")
    if not torch.cuda.is_available():
        raise SystemExit(f"this measures a CUDA GPU, and torch {torch.__version__} finds none here")
    device = rest[0] if rest else "cuda:0"
    with torch.cuda.device(device), torch.inference_mode():
        for row, *size in plan_peer(name):
            for line in measure(row, *size, device):
                print(json.dumps(line), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
