"""The results of `vlmq.eval.bench_gpu` as a table and as points of a roofline."""

from typing import Any

from vlmq.eval.bench_gpu_models import plan_models
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

MODEL_COLUMNS = (
    Column("model", "Model"),
    Column("mode", "Decoded as"),
    Column("tokens_per_second", "Tokens/s", ".1f"),
    Column("slowest", "Slowest", ".1f"),
    Column("over_bf16", "Times bf16", ".2f"),
    Column("share", "Of the ceiling", ".0%"),
    Column("first_token", "First token s", ".3f"),
    Column("weight_megabytes", "Weights MB", ".0f"),
    Column("peak_megabytes", "Peak MB", ".0f"),
)


def models_table(result: dict[str, Any]) -> Table:
    """The whole models of a result."""
    rows = []
    for line in result["models"]["models"]:
        suffix = f" ({line['backend']})" if line["backend"] else ""
        cells = line | {"model": (line["scheme"] or "bf16") + suffix, "slowest": line["spread"][0]}
        rows.append(tuple(cells[column.key] for column in MODEL_COLUMNS))
    preset = plan_models()[0].preset
    return Table(f"{preset} with random weights on {result['gpu']}, one prompt", MODEL_COLUMNS, tuple(rows))


def results_table(result: dict[str, Any]) -> Table:
    """The measurements of a result, and what other packages said where they did not run; the rest is in the result."""
    rows = []
    for line in result["measurements"]:
        group = f"-g{line['group_size']}" if line["group_size"] else "-channel"
        scheme = f"{line['format_name']}{group}" if line["format_name"] else "bf16"
        layer = f"{line['in_features']} to {line['out_features']}"
        times = (1e6 * seconds for seconds in (line["seconds"], *line["spread"]))
        rows.append(
            (line["kernel"], scheme, layer, line["n_tokens"], *times, line["share"], line["over_bf16"])
        )
    empty = (None,) * (len(COLUMNS) - 2)
    for line in (*result["peers"]["not_installed"], *result["peers"]["failed"]):
        rows.append((line["kernel"], line["error"], *empty))
    return Table(f"Packed layers on {result['gpu']}", COLUMNS, tuple(rows))


def gpu_roofline_points(result: dict[str, Any]) -> list[Point]:
    """Measurements of the layer that most kernels ran, the largest of these, as points of a roofline."""
    kernels: dict[tuple[int, int], set[str]] = {}
    for line in result["measurements"]:
        kernels.setdefault((line["in_features"], line["out_features"]), set()).add(line["kernel"])
    chosen = max(kernels, key=lambda size: (len(kernels[size]), size[0] * size[1]), default=None)
    points = []
    for line in result["measurements"]:
        if (line["in_features"], line["out_features"]) == chosen:
            name = f"{line['kernel']} {line['format_name']}".strip()
            n_operations = 2.0 * line["n_tokens"] * line["in_features"] * line["out_features"]
            points.append(Point(name, line["bytes"], n_operations, line["seconds"]))
    return points
