"""One block: statistics of each group of layers that share an input, their targets, their solution.

Layers are taken in the order of their calls (q/k/v, then o, then gate/up, then down), each group seeing the inputs that
the layers quantized before it produce. Layers that share inputs and token weights share H and are solved as one
matrix, row under row.
"""

import time

import torch
from torch import Tensor, nn

from vlmq.calib.block import Block
from vlmq.calib.drift import OutputShift, find_sum_point
from vlmq.calib.statistics import Statistics, collect_statistics
from vlmq.calib.walk import calls_in_order
from vlmq.formats import QuantizedWeight
from vlmq.heap import trim_heap
from vlmq.linalg import DAMP, damped, find_damping, proxy_loss, shift_target
from vlmq.report import LayerReport
from vlmq.run import Run
from vlmq.solvers import run_recipe


def quantize_block(run: Run, block: Block, weights: dict[str, list[Tensor]]) -> None:
    """Quantize the layers of a block that the plan names, in the order of their calls.

    Args:
        run: the call of `quantize`.
        block: the block, with its inputs on both paths.
        weights: per layer and call of the block, (n_tokens,) float32, from a saliency.
    """
    prefix = f"{block.spec.name}."
    for called in calls_in_order(block):
        names = [name for name in called if prefix + name in run.plan.schemes]
        if names:
            _quantize_group(run, block, names, weights, is_alone=len(called) == 1)
        block.settle(called)


def _quantize_group(
    run: Run, block: Block, names: list[str], weights: dict[str, list[Tensor]], *, is_alone: bool
) -> None:
    """Quantize layers that share an input; one that is alone may be the one that writes to the stream."""
    prefix = f"{block.spec.name}."
    given = {name: weights[name] for name in names}
    drift = _output_shift(run, block, names[0], weights) if is_alone else None
    if drift is None:
        statistics = collect_statistics(block, names, given, with_shift=run.alpha > 0)
    else:
        statistics = collect_statistics(block, names, given, with_shift=False, source=drift.inputs())
    trim_heap()
    for members in _same_problem(run, prefix, names, statistics):
        solve_together(
            run, prefix, members, statistics[members[0]], None if drift is None else drift.result()
        )


def _output_shift(run: Run, block: Block, name: str, weights: dict[str, list[Tensor]]) -> OutputShift | None:
    """Where the drift of the residual stream is gathered for a layer that writes to it; None for other layers."""
    if run.alpha == 0:
        return None
    point = find_sum_point(block, name)
    return None if point is None else OutputShift(block, name, point, weights[name])


def _same_problem(
    run: Run, prefix: str, names: list[str], statistics: dict[str, Statistics]
) -> list[list[str]]:
    """Layers that share statistics and scheme."""
    groups: dict[tuple[int, str], list[str]] = {}
    for name in names:
        scheme = run.plan.schemes[prefix + name]
        groups.setdefault((id(statistics[name]), f"{scheme.name} {scheme.solver}"), []).append(name)
    return list(groups.values())


def solve_together(
    run: Run,
    prefix: str,
    names: list[str],
    statistics: Statistics,
    shift: Tensor | None = None,
    notes: tuple[str, ...] = (),
) -> None:
    """Solve layers of one input as one matrix, row under row, and replace them.

    Args:
        run: the call of `quantize`.
        prefix: path of the block, with a dot at its end.
        names: paths of the layers in the block; they have one scheme.
        statistics: of their inputs.
        shift: (out_features, in_features) float32, the drift of the stream; None takes the one of the inputs.
        notes: what deviates from the plan, for the reports.
    """
    started = time.perf_counter()
    layers = [
        m for m in map(run.model.get_submodule, (prefix + n for n in names)) if isinstance(m, nn.Linear)
    ]
    scheme = run.plan.schemes[prefix + names[0]]
    weight = torch.cat([layer.weight.float() for layer in layers])
    try:
        damping = find_damping(statistics.H, float(scheme.options.get("damp", DAMP)))
        if shift is None and statistics.D is not None:
            shift = weight @ statistics.D
        with damped(statistics.H, damping):
            target = weight if shift is None else shift_target(weight, shift, statistics.H, run.alpha)
        del shift
        quantized = run_recipe(
            str(scheme.solver),
            weight,
            target,
            statistics.H,
            scheme.format,
            scheme.group_size,
            generator=torch.Generator(weight.device).manual_seed(run.seed),
            options=scheme.options,
        )
    except RuntimeError as error:
        raise RuntimeError(f"layers {prefix}{{{','.join(names)}}}: {error}") from error
    del weight
    with damped(statistics.H, damping):
        lost = proxy_loss(quantized.dequantize(), target, statistics.H)
        scale = proxy_loss(torch.zeros_like(target), target, statistics.H)
    del target
    seconds = (time.perf_counter() - started) / len(layers)
    notes += (f"damp raised {damping.n_retries} times",) if damping.n_retries else ()
    rows = [layer.weight.shape[0] for layer in layers]
    for name, part, loss, total in zip(
        names, _split(quantized, rows), lost.split(rows), scale.split(rows), strict=True
    ):
        full = prefix + name
        report = LayerReport(
            name=full,
            scheme=scheme.name,
            solver=str(scheme.solver),
            proxy_loss=float(loss.sum() / total.sum().clamp(min=1e-30)),
            true_bits_per_weight=run.plan.bits[full] / run.plan.n_weights[full],
            n_weights=run.plan.n_weights[full],
            n_tokens=statistics.n_tokens,
            n_effective=statistics.n_effective,
            damp=damping.damp,
            seconds=seconds,
            notes=notes,
        )
        run.replace(full, part, report)
        run.progress.layer(report, prefix.rstrip("."))


def _split(quantized: QuantizedWeight, rows: list[int]) -> list[QuantizedWeight]:
    """Cut a stack of matrices into its members."""
    n = len(rows)
    zeros = [None] * n if quantized.zeros is None else quantized.zeros.split(rows)
    return [
        QuantizedWeight(codes, scales, zero, quantized.format, quantized.group_size)
        for codes, scales, zero in zip(
            quantized.codes.split(rows), quantized.scales.split(rows), zeros, strict=True
        )
    ]
