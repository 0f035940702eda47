"""What a plan or a packed model consists of, as tables: by part, and by layer."""

import math
from typing import Any

from transformers import PreTrainedModel

from vlmq.eval.report import Column, Table
from vlmq.eval.size import sparsity
from vlmq.families.coverage import Share
from vlmq.families.packed import scheme_name
from vlmq.families.parts import part_of
from vlmq.linear import QuantLinear, true_bits
from vlmq.planning import Plan

PART_COLUMNS = (
    Column("part", "Part"),
    Column("scheme", "Scheme"),
    Column("n_layers", "Layers", ","),
    Column("n_weights", "Weights", ","),
    Column("true_bits_per_weight", "True bits per weight", ".3f"),
)
ZEROS = Column("sparsity", "Zeros", ".1%")
MEASURED = (Column("proxy_loss", "Proxy loss", ".2e"), Column("seconds", "Seconds", ".1f"))
TOKENS = (Column("n_tokens", "Tokens", ","), Column("n_effective", "Effective tokens", ",.0f"))
LEAST = Column("n_effective", "Effective tokens, least", ",.0f")
SHARE_COLUMNS = (
    Column("what", "Parameters"),
    Column("n_layers", "Layers", ","),
    Column("n_parameters", "Number", ","),
    Column("share", "Share", ".1%"),
)
KERNEL_COLUMNS = (
    Column("kernel", "Kernel"),
    Column("n_layers", "Layers", ","),
    Column("reasons", "Why not others"),
)
LAYER_COLUMNS = (
    Column("name", "Layer"),
    Column("scheme", "Scheme"),
    Column("shape", "Shape"),
    Column("kernel", "Kernel"),
    Column("true_bits_per_weight", "True bits per weight", ".3f"),
    ZEROS,
    Column("solver", "Solver"),
    *MEASURED,
    *TOKENS,
    Column("notes", "Notes"),
)


def plan_table(plan: Plan) -> Table:
    """What a plan quantizes, by part and scheme."""
    rows = tuple(tuple(row[column.key] for column in PART_COLUMNS) for row in plan.rows())
    return Table("Plan", PART_COLUMNS, rows)


def share_table(shares: list[Share]) -> Table:
    """Which share of all parameters is quantized, and what the rest is."""
    rows = tuple(tuple(getattr(share, column.key) for column in SHARE_COLUMNS) for share in shares)
    return Table("Coverage", SHARE_COLUMNS, rows)


def part_table(model: PreTrainedModel) -> Table:
    """What is packed in a model, by part and scheme.

    Proxy losses are means over the layers' weights; effective tokens are those of the layer whose tokens are worth
    the least, the one to look at when calibration was short or a saliency steep.
    """
    groups: dict[tuple[str, str], list[QuantLinear]] = {}
    for name, layer in packed_layers(model).items():
        groups.setdefault((part_of(model, name, layer), scheme_name(layer)), []).append(layer)
    rows = []
    for (part, scheme), layers in sorted(groups.items()):
        n_weights = sum(n_weights_of(layer) for layer in layers)
        reports = [layer.report for layer in layers if layer.report is not None]
        weight = sum(report.n_weights for report in reports)
        loss = sum(r.proxy_loss * r.n_weights for r in reports) / weight if weight else math.nan
        seconds = sum(report.seconds for report in reports) if reports else math.nan
        least = min((report.n_effective for report in reports), default=None)
        bits = sum(true_bits(layer) for layer in layers) / n_weights
        rows.append((part, scheme, len(layers), n_weights, bits, sparsity(layers), loss, seconds, least))
    return Table("Quantized layers", (*PART_COLUMNS, ZEROS, *MEASURED, LEAST), tuple(rows))


def layer_table(model: PreTrainedModel) -> Table:
    """Every packed layer of a model."""
    rows = []
    for name, layer in packed_layers(model).items():
        report = layer.report
        measured: tuple[Any, ...] = (None,) * 6
        if report is not None:
            notes = "; ".join(report.notes)
            figures = (report.proxy_loss, report.seconds, report.n_tokens, report.n_effective)
            measured = (report.solver, *figures, notes)
        shape = f"{layer.out_features} x {layer.in_features}"
        bits = true_bits(layer) / n_weights_of(layer)
        zeros = sparsity([layer])
        rows.append((name, scheme_name(layer), shape, layer.kernel(), bits, zeros, *measured))
    return Table("Layers", LAYER_COLUMNS, tuple(rows))


def kernel_table(model: PreTrainedModel) -> Table:
    """Which kernels the packed layers take where they are, and why not the others that are preferred."""
    groups: dict[tuple[str, str], int] = {}
    for layer in packed_layers(model).values():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in layer.explain().items() if reason)
        key = layer.kernel(), reasons
        groups[key] = groups.get(key, 0) + 1
    rows = tuple((kernel, n_layers, reasons) for (kernel, reasons), n_layers in sorted(groups.items()))
    return Table("Kernels", KERNEL_COLUMNS, rows)


def packed_layers(model: PreTrainedModel) -> dict[str, QuantLinear]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def n_weights_of(layer: QuantLinear) -> int:
    """Number of weights of a packed layer."""
    return layer.out_features * layer.in_features
