"""The results of `vlmq.eval.bench_gpu` as a table and as points of a roofline."""

from typing import Any

from vlmq.eval.bench_gpu import Case
from vlmq.eval.report import Column, Table
from vlmq.eval.roofline import Point

COLUMNS = (
    Column("kernel", "Kernel"),
    Column("scheme", "Format"),
    Column("layer", "Layer"),
    Column("n_tokens", "Tokens", "d"),
    Column("microseconds", "Median us", ".1f"),
    Column("fastest", "Fastest", ".1f"),
    Column("slowest", "Slowest", ".1f"),
    Column("share", "Of the ceiling", ".0%"),
    Column("over_bf16", "Times torch bf16", ".2f"),
)


def results_table(result: dict[str, Any]) -> Table:
    """The measurements of a result; what failed or found no time is in the result alone."""
    rows = []
    for line in result["measurements"]:
        group = f"-g{line['group_size']}" if line["group_size"] else "-channel"
        scheme = f"{line['format_name']}{group}" if line["format_name"] else "bf16"
        layer = f"{line['in_features']} to {line['out_features']}"
        times = (1e6 * seconds for seconds in (line["seconds"], *line["spread"]))
        rows.append(
            (line["kernel"], scheme, layer, line["n_tokens"], *times, line["share"], line["over_bf16"])
        )
    return Table(f"Packed layers on {result['gpu']}", COLUMNS, tuple(rows))


def gpu_roofline_points(result: dict[str, Any]) -> list[Point]:
    """Measurements of the largest layer that was measured, as points of a roofline."""
    largest = max((line["in_features"] * line["out_features"] for line in result["measurements"]), default=0)
    points = []
    for line in result["measurements"]:
        case = Case(**{key: line[key] for key in Case.__dataclass_fields__})
        if case.in_features * case.out_features == largest:
            name = f"{case.kernel} {case.format_name}".strip()
            points.append(Point(name, case.bytes_read, case.operations, line["seconds"]))
    return points
