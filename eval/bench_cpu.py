"""Time of the CPU kernels for one token, with weights that come from memory, against torch in the same run.

    python -m vlmq.eval.bench_cpu --threads 2 --json cpu.json

Packages that run on CPUs too (`vlmq.eval.peers`) are timed beside them where they are installed.

Each layer is (4096, 4096). A row rotates over copies of `ROTATION_BYTES`, more than a cache holds. Rows take turns, so
that what disturbs the machine disturbs all: two calls each, of which the second is timed, for the first one after
another row is slower. Their order is drawn anew for each round: a row is a fifth slower after one that reads much more,
perhaps for page tables that have left the caches. A figure is the median of a row's calls with the quartiles beside it.
Read bandwidth is that of a sum over as many bytes, by the same threads. The machine must be idle: the load average is
stored, and above `MAX_LOAD` the figures say little.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmq.eval import bench_cpu_peers
from vlmq.eval.peers import relative_error
from vlmq.eval.report import Column, Table, as_markdown, as_records
from vlmq.eval.roofline import Point
from vlmq.eval.smollm2 import commit
from vlmq.eval.turns import SLOW_EVERY, Call, Turn, second_of_two
from vlmq.formats import get_format, n_groups
from vlmq.kernels import cpu, reference
from vlmq.kernels.library import open_library, usable_isas
from vlmq.kernels.packing import row_bytes

SIZE = 4096
PEAK_SIZE = 2048
ROTATION_BYTES = 100 * 2**20
MAX_LOAD = 0.5
WARM_UP = 2
"""Turns that are not counted."""

FORMATS = (("ternary", 128), ("ternary", 0), ("int2", 64), ("int3", 64), ("int4", 128), ("binary", 128))
COLUMNS = (
    Column("name", "Layer"),
    Column("isa", "Path"),
    Column("ms", "Median ms", ".3f"),
    Column("ms_low", "Quartile", ".3f"),
    Column("ms_high", "Quartile", ".3f"),
    Column("gb_per_second", "GB/s", ".1f"),
    Column("bandwidth_share", "Of bandwidth", ".0%"),
    Column("speedup", "Times torch bf16", ".2f"),
    Column("bits_per_weight", "True bits", ".2f"),
    Column("error", "Error", ".1e"),
)


def turn_of(call: Call, n_bytes: int, values: Tensor, x: Tensor) -> Turn:
    """A row from a call, what it reads, and its first layer's weights in float."""
    error = relative_error(call(0), values, x)  # pyright: ignore[reportArgumentType]
    return Turn(lambda i: second_of_two(call, i), n_bytes, 8 * n_bytes / SIZE**2, error)


def packed_layers(format_name: str, group_size: int, isas: list[str]) -> dict[str, Turn]:
    """Layers of random codes, in turn, on one token, for each path.

    The paths share the layers and start apart in them, so none finds in a cache what another has just read.
    """
    fmt = get_format(format_name)
    groups = (SIZE, n_groups(SIZE, group_size or None))
    codes = torch.randint(0, 256, (SIZE, row_bytes(SIZE, fmt.bits)), dtype=torch.uint8)
    scales = torch.rand(*groups, fmt.n_terms).half()
    zeros = torch.randint(0, 256, groups, dtype=torch.uint8) if fmt.has_zero else None
    size_bytes = sum(part.nbytes for part in (codes, scales, zeros) if part is not None)
    n_layers = 1 + ROTATION_BYTES // size_bytes
    copies = [
        (codes.clone(), scales.clone(), None if zeros is None else zeros.clone()) for _ in range(n_layers)
    ]
    x = torch.randn(1, SIZE, dtype=torch.bfloat16)
    values = reference.dequantize(codes, scales, zeros, format_name, SIZE, group_size)

    def calls(isa: str, start: int) -> Call:
        layers = [cpu.bind(*parts, None, format_name, SIZE, group_size, isa=isa) for parts in copies]
        return lambda i: layers[(start + i) % n_layers](x)

    return {
        isa: turn_of(calls(isa, k * n_layers // len(isas)), size_bytes, values, x)
        for k, isa in enumerate(isas)
    }


def dense_layers() -> Turn:
    """The same with torch's bfloat16 linear layer."""
    size_bytes = 2 * SIZE * SIZE
    weights = [torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(1 + ROTATION_BYTES // size_bytes)]
    x = torch.randn(1, SIZE, dtype=torch.bfloat16)
    return turn_of(lambda i: functional.linear(x, weights[i % len(weights)]), size_bytes, weights[0], x)


def torch_int4_layers() -> Turn:
    """The same with torch's own int4 operator, in groups of 128."""
    group_size = min(128, SIZE)
    size_bytes = SIZE * SIZE // 2 + 4 * SIZE * SIZE // group_size
    codes = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32)
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    weights = [pack(codes, 1) for _ in range(1 + ROTATION_BYTES // size_bytes)]
    scales = torch.randn(SIZE // group_size, SIZE, 2, dtype=torch.bfloat16)
    x = torch.randn(1, SIZE, dtype=torch.bfloat16)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    scale, zero = scales.float().repeat_interleave(group_size, 0).permute(2, 1, 0)
    values = (codes - 8) * scale + zero
    return turn_of(
        lambda i: multiply(x, weights[i % len(weights)], group_size, scales), size_bytes, values, x
    )


def read_all() -> Turn:
    """A sum over a block of memory, in turn: the bandwidth that reading can reach."""
    blocks = [torch.ones(2**22, dtype=torch.int64) for _ in range(4)]
    return Turn(lambda i: second_of_two(lambda k: blocks[k % 4].sum(), i), blocks[0].nbytes)


def measure(turns: dict[tuple[str, str], Turn], n_rounds: int) -> Table:
    """Time the rows in turns, in an order drawn anew for each round; medians and quartiles in milliseconds, bandwidth
    against that of `read`."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
    order = list(turns)
    drawn = random.Random(0)
    for i in range(n_rounds):
        drawn.shuffle(order)
        for key in order:
            turn = turns[key]
            if turn.is_slow and i % SLOW_EVERY != WARM_UP:
                continue
            milliseconds = turn.run(i)
            if i >= WARM_UP:
                times[key].append(milliseconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    rates = {key: turn.n_bytes / medians[key] / 1e6 for key, turn in turns.items()}
    top, dense = rates["read", "torch"], medians["bfloat16", "torch"]
    rows = []
    for key, turn in turns.items():
        low, _, high = statistics.quantiles(times[key] * 2 if len(times[key]) == 1 else times[key], n=4)
        speeds = (rates[key], rates[key] / top, None if turn.error is None else dense / medians[key])
        rows.append((*key, medians[key], low, high, *speeds, turn.bits_per_weight, turn.error))
    return Table(f"{SIZE} x {SIZE}, one token", COLUMNS, tuple(rows))


def dense_peak(n_rounds: int = 5) -> float:
    """Operations per second of a large bfloat16 product by torch: the flat part of the roofline."""
    a = torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=torch.bfloat16)
    times = []
    for _ in range(n_rounds):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * PEAK_SIZE**3 / statistics.median(times)


def bench_cpu(
    threads: int,
    *,
    n_rounds: int = 60,
    isas: list[str] | None = None,
    peers: Sequence[str] = bench_cpu_peers.NAMES,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[Table, dict[str, Any]]:
    """Time all rows.

    Args:
        threads: of torch and of the kernels.
        n_rounds: calls of each row, at least 4.
        isas: paths to time; None is all that this CPU has but the portable one.
        peers: packages to time beside; one that cannot run has a row that says why.
        report: told a line before each step.

    Returns:
        the table, and a record of it with the machine, its load and the ceilings.

    Raises:
        ValueError: there is no C library, or it has no such path here.
    """
    library = open_library()
    if isinstance(library, str):
        raise ValueError(f"there are no CPU kernels to time: {library}")
    usable = usable_isas(library)
    chosen = isas or [isa for isa in usable if isa != "portable"]
    unknown = [isa for isa in chosen if isa not in usable]
    if unknown or n_rounds < 4:
        raise ValueError(
            f"expected paths among {' '.join(usable)} and at least 4 rounds, got {' '.join(chosen)} and {n_rounds}"
        )
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    with ExitStack() as stack, torch.inference_mode():
        others, not_run = bench_cpu_peers.open_rows(
            stack, peers, threads, SIZE, ROTATION_BYTES, report=report
        )
        turns = {("read", "torch"): read_all(), ("bfloat16", "torch"): dense_layers()}
        turns["int4-g128", "torch"] = torch_int4_layers()
        for name, group_size in FORMATS:
            scheme = f"{name}-g{group_size}" if group_size else f"{name}-channel"
            turns |= {(scheme, isa): turn for isa, turn in packed_layers(name, group_size, chosen).items()}
        report(f"timing {len(turns) + len(others)} rows in turns, about half a minute")
        table = measure(turns | others, n_rounds)
        peak = dense_peak()
    empty = (None,) * (len(COLUMNS) - 2)
    table = replace(table, rows=(*table.rows, *((name, reason, *empty) for name, reason in not_run)))
    machine = {"cpu": platform.processor() or platform.machine(), "n_cores": os.cpu_count(), "load": load}
    record = {
        "commit": commit(),
        "machine": machine,
        "torch": torch.__version__,
        "threads": threads,
        "dense_peak": peak,
    }
    return table, {"commit": commit(), **record, "rows": as_records(table)}


def roofline_points(record: dict[str, Any]) -> tuple[list[Point], float]:
    """Points of the roofline from a record, the fastest path of each layer, and the bandwidth in bytes per second."""
    points, bandwidth = [], 0.0
    fastest: dict[tuple[str, bool], float] = {}
    rows = [row for row in record["rows"] if row["ms"] is not None]
    for row in rows:
        key = row["name"], row["isa"] == "torch"
        fastest[key] = min(row["ms"], fastest.get(key, row["ms"]))
    for row in rows:
        if row["ms"] > fastest[row["name"], row["isa"] == "torch"]:
            continue
        n_bytes = row["gb_per_second"] * row["ms"] * 1e6
        if row["name"] == "read":
            bandwidth = row["gb_per_second"] * 1e9
            continue
        words = row["name"].split()
        is_ours = len(words) == 1
        series = f"{words[0]} ({row['isa']})" if is_ours else f"{words[0]} {words[-1]}"
        points.append(Point(series, n_bytes, 2.0 * SIZE * SIZE, row["ms"] / 1e3))
    return points, bandwidth


def main() -> None:
    """Read the arguments, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60, help="calls of each row")
    parser.add_argument("--isa", nargs="*", help="paths to time; all but portable unless told")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    table, record = bench_cpu(arguments.threads, n_rounds=arguments.rounds, isas=arguments.isa, report=print)
    if record["machine"]["load"] > MAX_LOAD:
        print(
            f"load average {record['machine']['load']:.1f}: other jobs run here, the figures are only indicative"
        )
    print(as_markdown(table))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
