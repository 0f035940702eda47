"""quantize: from a full-precision model and calibration data to packed layers, block by block.

For each block, in the order of execution, with its inputs on the full-precision path F and on the quantized
path U:

1. the saliency gives each token of each layer a weight s;
2. layers are taken in the order of their calls (q/k/v, then o, then gate/up, then down), each seeing the inputs that
   the layers quantized before it produce;
3. H = U S U^T and D = (F - U) S U^T are gathered, the target is T = W + alpha W D H^-1; for a layer whose output is
   added to the residual stream, the drift of the stream itself takes the place of W D (`vlmq.calib.drift`);
4. the solver finds the codes, and the layer is replaced.

Layers that share inputs and token weights share H and are solved as one matrix, row under row.

Memory at the peak, beside the model: two stored block outputs per batch (on the CPU), one copy of the
block, and for the layers with the most inputs three matrices of (in_features, in_features) float32; packed
layers as they come.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.attach import attach
from vlmq.calib.batches import as_batches
from vlmq.calib.block import Block
from vlmq.calib.drift import OutputShift, find_sum_point
from vlmq.calib.saliency import SALIENCIES, prepare, read_options
from vlmq.calib.statistics import Statistics, collect_statistics
from vlmq.calib.tokens import CalibBatch
from vlmq.calib.walk import calls_in_order, walk_blocks
from vlmq.formats import QuantizedWeight
from vlmq.linalg import DAMP, damp_and_factor, proxy_loss, shift_target
from vlmq.linear import QuantLinear
from vlmq.planning import Plan, plan
from vlmq.progress import Progress, SilentProgress
from vlmq.report import LayerReport
from vlmq.scheme import Scheme
from vlmq.solvers import run_recipe

DEFAULT_ALPHA = 0.5
DEFAULT_SALIENCY = "uniform"


def quantize(
    model: PreTrainedModel,
    calib_data: Any,
    scheme: str | Scheme = "int4-g128",
    *,
    solver: str | None = None,
    saliency: str = DEFAULT_SALIENCY,
    saliency_options: Mapping[str, Any] | None = None,
    alpha: float = DEFAULT_ALPHA,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Quantize a model in place, after training, and return it.

    The model keeps its class and its forward; its linear layers become `QuantLinear`.
    `model.save_pretrained` and `from_pretrained` work as before. If anything fails, the model is put back
    as it was.

    Args:
        model: any transformers model: image-text-to-text, dual encoder or language model.
        calib_data: a CalibrationSet of `vlmq.calib.load`, or batches of model inputs, or token ids.
        scheme: format and group size, such as "int4-g128", "int2-g64", "ternary-channel".
        solver: a recipe such as "gptq+cd"; None takes the default of each format.
        saliency: how tokens are weighted, a name of `vlmq.calib.saliency.SALIENCIES`.
        saliency_options: options of the saliency, see `vlmq.calib.saliency.read_options`.
        alpha: strength of the asymmetric target, 0 (plain) to 1 (full least squares towards the original's
            outputs).
        overrides: part ("vision", "projector", "language", "text") or pattern over layer names -> scheme,
            or None to keep those layers.
        options: options of the solver, such as {"damp": 0.05}.
        device: where blocks are computed; None is where the model is.
        seed: seed of everything random; the same seed on the same machine gives the same packed bytes.
        progress: told about every layer; None is silent.

    Raises:
        ValueError: a name, shape, option or calibration row is wrong, before any work starts.
        RuntimeError: inputs that are not finite, a layer that no token reached, a hessian that cannot be
            factored.
    """
    check_alpha(alpha)
    labels, post = read_options(saliency, saliency_options)
    recipe = plan(model, scheme, solver=solver, overrides=overrides, options=options)
    batches = as_batches(calib_data, model)
    context = prepare(saliency, model, recipe.layout, batches, labels=labels, post=post, seed=seed)
    run = _Run(model, recipe, alpha, seed, progress or SilentProgress())
    run.progress.start(len(run.blocks()), len(recipe.schemes))
    is_done = False
    try:
        with torch.no_grad():
            for block in _walk(run, batches, device):
                weights = SALIENCIES[saliency](block, context)
                _quantize_block(run, block, weights)
        run.pack()
        is_done = True
    finally:
        if not is_done:
            run.restore()
        run.progress.finish()
    attach(
        model,
        {name: scheme.name for name, scheme in recipe.schemes.items()},
        {
            "solver": sorted({str(s.solver) for s in recipe.schemes.values()}),
            "options": dict(options or {}),
            "saliency": saliency,
            "saliency_options": dict(saliency_options or {}),
            "alpha": alpha,
            "seed": seed,
            "calibration": getattr(calib_data, "hash", None),
        },
    )
    return model


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless the strength of the asymmetric target is between 0 and 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")


@dataclass
class _Run:
    """One call of quantize: the layers taken out, and the packed ones that will take their place."""

    model: PreTrainedModel
    plan: Plan
    alpha: float
    seed: int
    progress: Progress
    originals: dict[str, nn.Linear] = field(default_factory=dict)
    packed: dict[str, QuantLinear] = field(default_factory=dict)

    def blocks(self) -> set[str]:
        """Blocks that hold at least one layer of the plan."""
        infos = (self.plan.layout.linears[name] for name in self.plan.schemes)
        return {info.block for info in infos if info.block is not None}

    def replace(self, name: str, quantized: QuantizedWeight, report: LayerReport) -> None:
        """Put a layer with the quantized values in place for the rest of the walk, and keep the packed one."""
        original = self.model.get_submodule(name)
        assert isinstance(original, nn.Linear)
        self.originals[name] = original
        dense = nn.Linear(1, 1, bias=False, device="meta")
        dense.in_features, dense.out_features = original.in_features, original.out_features
        weight = quantized.dequantize(original.weight.dtype).to(original.weight.device)
        dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), original.bias
        self.model.set_submodule(name, dense)
        packed = QuantLinear.from_quantized(quantized, original.bias, dtype=original.weight.dtype)
        packed.to(original.weight.device)
        packed.report = report
        self.packed[name] = packed

    def pack(self, prefix: str = "") -> None:
        """Put the packed layers under `prefix` in place of their dense stand-ins."""
        for name, layer in self.packed.items():
            if name.startswith(prefix):
                self.model.set_submodule(name, layer)

    def restore(self) -> None:
        """Put the full-precision layers back."""
        for name, layer in self.originals.items():
            self.model.set_submodule(name, layer)


def _walk(run: _Run, batches: list[CalibBatch], device: torch.device | str | None) -> Iterator[Block]:
    """Blocks of the plan in order; a block's dense stand-ins give way to packed layers once it has been left."""
    wanted = run.blocks()
    previous: str | None = None
    for block in walk_blocks(run.model, run.plan.layout, batches, device=device, names=wanted):
        if previous is not None:
            run.pack(f"{previous}.")
        previous = block.spec.name
        yield block


def _quantize_block(run: _Run, block: Block, weights: dict[str, list[Tensor]]) -> None:
    prefix = f"{block.spec.name}."
    for called in calls_in_order(block):
        names = [name for name in called if prefix + name in run.plan.schemes]
        if names:
            _quantize_group(run, block, names, weights, is_alone=len(called) == 1)
        block.settle(called)


def _quantize_group(
    run: _Run, block: Block, names: list[str], weights: dict[str, list[Tensor]], *, is_alone: bool
) -> None:
    """Quantize layers that share an input; one that is alone may be the one that writes to the stream."""
    prefix = f"{block.spec.name}."
    given = {name: weights[name] for name in names}
    drift = _output_shift(run, block, names[0], weights) if is_alone else None
    if drift is None:
        statistics = collect_statistics(block, names, given, with_shift=run.alpha > 0)
    else:
        statistics = collect_statistics(block, names, given, with_shift=False, source=drift.inputs())
    for members in _same_problem(run, prefix, names, statistics):
        shift = None if drift is None else drift.result()
        _solve_together(run, prefix, members, statistics[members[0]], shift)


def _output_shift(run: _Run, block: Block, name: str, weights: dict[str, list[Tensor]]) -> OutputShift | None:
    """Where the drift of the residual stream is gathered for a layer that writes to it; None for other layers."""
    if run.alpha == 0:
        return None
    point = find_sum_point(block, name)
    return None if point is None else OutputShift(block, name, point, weights[name])


def _same_problem(
    run: _Run, prefix: str, names: list[str], statistics: dict[str, Statistics]
) -> list[list[str]]:
    """Layers that share statistics and scheme."""
    groups: dict[tuple[int, str], list[str]] = {}
    for name in names:
        scheme = run.plan.schemes[prefix + name]
        groups.setdefault((id(statistics[name]), f"{scheme.name} {scheme.solver}"), []).append(name)
    return list(groups.values())


def _solve_together(
    run: _Run, prefix: str, names: list[str], statistics: Statistics, shift: Tensor | None
) -> None:
    """Solve layers of one input as one matrix, row under row, and replace them."""
    started = time.perf_counter()
    layers = [
        m for m in map(run.model.get_submodule, (prefix + n for n in names)) if isinstance(m, nn.Linear)
    ]
    scheme = run.plan.schemes[prefix + names[0]]
    weight = torch.cat([layer.weight.float() for layer in layers])
    try:
        damped = damp_and_factor(statistics.H, float(scheme.options.get("damp", DAMP)))
        if shift is None and statistics.D is not None:
            shift = weight @ statistics.D
        target = weight if shift is None else shift_target(weight, shift, damped.hessian, run.alpha)
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
    lost = proxy_loss(quantized.dequantize(), target, damped.hessian)
    scale = proxy_loss(torch.zeros_like(target), target, damped.hessian)
    seconds = (time.perf_counter() - started) / len(layers)
    notes = (f"damp raised {damped.n_retries} times",) if damped.n_retries else ()
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
            damp=damped.damp,
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
