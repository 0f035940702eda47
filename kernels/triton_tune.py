"""Find the fastest tiles of the one-pass kernel for given shapes, by timing, and keep them in the user's table.

Candidates are the rule's own configuration and its neighbours. Each is run in a CUDA graph over enough copies of the
weight that none of them stays in the L2 cache, and takes the median of its replays. Entries count from the next
process on.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor

from vlmq.formats import get_format
from vlmq.kernels import triton_linear
from vlmq.kernels.packing import row_bytes
from vlmq.kernels.triton_config import MatmulConfig, default_matmul, matmul_key, read_table, traps, user_table

COLD_BYTES = 300 * 2**20
"""Weights that are read in turn, several times the L2 cache of any GPU so far."""


@dataclass(frozen=True)
class Shape:
    """One product to tune; `group_size` 0 is one group per channel."""

    format_name: str
    group_size: int
    out_features: int
    in_features: int
    n_tokens: int


def candidates(shape: Shape, arch: str, n_processors: int) -> list[MatmulConfig]:
    """Return the rule's configuration first, then its neighbours in tile height, splits, stages, blocks and warps."""
    fmt = get_format(shape.format_name)
    sizes = (shape.n_tokens, shape.out_features, shape.in_features)
    rule = default_matmul(arch, *sizes, fmt, shape.group_size, n_processors)
    blocks = [1] if shape.group_size or fmt.bits == 8 else [1, 2, 4]
    found = [rule]
    for block_n, warps in (
        ((64, 2), (128, 2), (128, 4), (256, 4)) if rule.block_m < 64 else ((128, 4), (128, 8))
    ):
        for n_blocks in blocks:
            for splits in sorted({max(1, rule.splits // 2), rule.splits, 2 * rule.splits, 4 * rule.splits}):
                for stages in (3, 4):
                    tiles = {"block_n": block_n, "blocks": n_blocks, "splits": splits}
                    found.append(replace(rule, **tiles, warps=warps, stages=stages))
    if traps(arch, shape.group_size):  # one that did would take the process with it
        found = [config for config in found if config.warps == 2]
    return list(dict.fromkeys(found))


def tune(
    shapes: Iterable[Shape],
    *,
    path: Path | None = None,
    measure: Callable[[Shape, MatmulConfig], float] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, MatmulConfig]:
    """Time the candidates of each shape and add the fastest to the table at `path`.

    Args:
        shapes: what to tune.
        path: file to write after each shape, by default the user's; entries that it has of other shapes are kept.
        measure: seconds that a configuration takes, infinite if it cannot run; by default timed on the current GPU.
        report: told a line after each shape.

    Returns:
        The entries found.

    Raises:
        RuntimeError: there is no GPU, or a CUDA graph is being captured.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"tuning times kernels on a CUDA GPU, and torch {torch.__version__} finds none; run it where the GPU is"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("kernels cannot be tuned while a CUDA graph is captured; tune before")
    path = path or user_table()
    device = torch.device("cuda", torch.cuda.current_device())
    arch = triton_linear.architecture(device)
    found = {}
    for shape in shapes:
        fmt = get_format(shape.format_name)
        tried = candidates(shape, arch, triton_linear.n_processors(device))
        seconds = {config: (measure or measure_seconds)(shape, config) for config in tried}
        key = matmul_key(
            arch,
            shape.n_tokens,
            shape.out_features,
            shape.in_features,
            fmt.bits,
            fmt.n_terms,
            shape.group_size,
        )
        found[key] = min(tried, key=seconds.__getitem__)
        _write(path, (read_table(path) if path.exists() else {}) | found)
        gain = seconds[tried[0]] / seconds[found[key]]
        report(f"{key}: {1e6 * seconds[found[key]]:.1f} us, {gain:.2f} times as fast as the rule's tiles")
    return found


def _write(path: Path, table: dict[str, MatmulConfig]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {key: list(astuple(config)) for key, config in sorted(table.items())}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(lines, indent=1) + "\n")
    part.replace(path)


def measure_seconds(shape: Shape, config: MatmulConfig) -> float:
    """Median seconds of one call, weights cold; infinite where the tiles do not fit this GPU."""
    weights = cold_weights(shape)
    x = torch.randn(shape.n_tokens, shape.in_features, device="cuda", dtype=torch.bfloat16)
    sizes = (shape.format_name, shape.in_features, shape.group_size)

    def run(weight: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        return triton_linear.fused_linear(x, *weight, *sizes, config=config)

    try:
        run(weights[0])
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    return graph_seconds([lambda weight=weight: run(weight) for weight in weights])


def cold_weights(shape: Shape) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Random packed weights (qweight, scales, zeros) of a shape, COLD_BYTES of them and three at least."""
    fmt = get_format(shape.format_name)
    n_bytes = row_bytes(shape.in_features, fmt.bits)
    groups = (shape.out_features, -(-shape.in_features // shape.group_size) if shape.group_size else 1)
    n_copies = max(3, COLD_BYTES // (shape.out_features * n_bytes))
    return [
        (
            torch.randint(0, 256, (shape.out_features, n_bytes), dtype=torch.uint8, device="cuda"),
            torch.rand(*groups, fmt.n_terms, device="cuda").half(),
            torch.randint(0, 256, groups, dtype=torch.uint8, device="cuda") if fmt.has_zero else None,
        )
        for _ in range(n_copies)
    ]


def graph_seconds(calls: list[Callable[[], object]], n_replays: int = 15) -> float:
    """Median seconds of one of the calls, which are captured in one CUDA graph and replayed."""
    return median(replay_seconds(calls, n_replays))


def replay_seconds(calls: list[Callable[[], object]], n_replays: int = 15) -> list[float]:
    """Seconds of one call in each replay of a CUDA graph of all of them, sorted; two replays warm up."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(n_replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / len(calls))
    return sorted(seconds[2:])
