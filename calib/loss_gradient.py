"""Gradients of the model's loss at the output of every linear layer, one forward and one backward pass per batch.

The token-diagonal Fisher weight of token n at a layer with output Z is s_n = mean_c (dLoss/dZ_nc)^2; the loss is that
of `vlmq.calib.loss`. No parameter takes a gradient, so that a pass costs about two forwards. At the peak the model
and the activations of one batch are on the device; what is kept is one float per layer and token, in CPU memory.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.calib.loss import Labels, batch_loss, data_labels, model_labels, reference_kind
from vlmq.calib.replay import calibration_mode
from vlmq.calib.saliency_residual import attention_modules, attention_of, in_graph
from vlmq.calib.saliency_tokens import frozen, hooked
from vlmq.calib.tokens import IMAGE, CalibBatch
from vlmq.calib.trees import load
from vlmq.families import Layout

# Layer -> per call of its block, the reduced gradients (n_tokens,), in the order of the layers' calls.
CallScores = dict[str, list[Tensor]]


def loss_weights(
    model: PreTrainedModel, layout: Layout, batches: list[CalibBatch], *, labels: str = "data", seed: int = 0
) -> dict[str, list[Tensor]]:
    """Per full name of a block's linear layer, per call of its block: mean_c (dLoss/dZ_nc)^2, (n_tokens,) float32.

    Each tensor has a scale of its own, so that small gradients do not vanish when they are squared.

    Raises:
        RuntimeError: the loss of a batch is not finite, or depends on no linear layer.
    """

    def mean_square(gradient: Tensor) -> Tensor:
        peak = gradient.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        return (gradient / peak).square().mean(dim=-1)

    weights: dict[str, list[Tensor]] = {}
    for scores in _passes(model, layout, batches, mean_square, labels=labels, seed=seed):
        for name, calls in scores.items():
            weights.setdefault(name, []).extend(calls)
    return weights


def image_ratios(
    model: PreTrainedModel, layout: Layout, batches: list[CalibBatch], *, labels: str = "data", seed: int = 0
) -> dict[str, float]:
    """Per full name of a block's linear layer: MBQ's ratio rho of image to answer (or text) gradients.

    The last layer called in each half of a block (attention, MLP) stands for the half's output Y. Only layers of
    blocks that see both kinds of tokens have an entry.
    """
    reference = reference_kind(batches)
    halves = _halves(model, layout)
    sums: dict[tuple[str, str], Tensor] = {}  # image gradients, image tokens, text gradients, text tokens
    passes = _passes(model, layout, batches, lambda g: g.abs().mean(dim=-1), labels=labels, seed=seed)
    for scores, batch in zip(passes, batches, strict=True):
        last = {halves[name]: calls for name, calls in scores.items() if name in halves}
        kinds = batch.kinds.flatten()
        members = [(kinds == kind).double() for kind in (IMAGE, reference)]
        for half, calls in last.items():
            for call in calls:
                if call.shape == kinds.shape:
                    added = torch.stack([t for m in members for t in ((call * m).sum(), m.sum())])
                    sums[half] = sums.get(half, torch.zeros_like(added)) + added
    ratios = {
        half: (image / n_image) / (text / n_text)
        for half, (image, n_image, text, n_text) in ((half, total.tolist()) for half, total in sums.items())
        if n_image > 0 and n_text > 0 and text > 0
    }
    floors = {kind: median(r for (_, k), r in ratios.items() if k == kind) for kind in {k for _, k in ratios}}
    return {name: max(ratios[half], floors[half[1]]) for name, half in halves.items() if half in ratios}


def _halves(model: PreTrainedModel, layout: Layout) -> dict[str, tuple[str, str]]:
    """Layer -> (block, "attention" or "mlp"), for the blocks that see the language model's tokens."""
    halves = {}
    for spec in layout.blocks:
        block = model.get_submodule(spec.name)
        attentions = attention_modules(block)
        for name in _linears(block):
            half = "attention" if attention_of(name, attentions) else "mlp"
            if spec.part in ("language", "text"):
                halves[f"{spec.name}.{name}"] = (spec.name, half)
    return halves


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if type(module) is nn.Linear}


def _passes(
    model: PreTrainedModel,
    layout: Layout,
    batches: list[CalibBatch],
    reduce: Callable[[Tensor], Tensor],
    *,
    labels: str,
    seed: int,
) -> Iterator[CallScores]:
    """Per batch, `reduce` of the gradient (n_tokens, out_features) at the output of each linear layer of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    source: Labels = {"data": data_labels, "model": model_labels(generator)}[labels]
    reference = reference_kind(batches)
    device = next(model.parameters()).device
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with calibration_mode(model), frozen(model):
        for i, batch in enumerate(batches):
            recorder = _Recorder(reduce)
            with recorder.watching(model, layout), torch.enable_grad():
                outputs = model(**load(dict(batch.inputs), device), **options)
                loss = batch_loss(outputs, batch, reference, source, generator)
                if not loss.requires_grad or not bool(torch.isfinite(loss)):
                    raise RuntimeError(
                        f"saliency: expected a finite loss that depends on the linear layers in batch {i}, got "
                        f"{loss.item()}; look for NaN in the inputs, or choose a saliency without loss gradients"
                    )
                loss.backward()
            yield recorder.scores()


class _Recorder:
    """Takes the gradients at the outputs of the blocks' linear layers during one forward and backward pass.

    A layer that a call of its block does not reach (an expert without tokens) gets an empty tensor for it, one whose
    output does not reach the loss zeros.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce
        self._n_calls: dict[str, int] = {}
        self._layers: dict[str, list[str]] = {}
        self._pieces: dict[str, list[list[Tensor]]] = {}

    @contextmanager
    def watching(self, model: nn.Module, layout: Layout) -> Iterator[None]:
        """Record while the context is open."""
        handles = []
        for spec in layout.blocks:
            block = model.get_submodule(spec.name)
            linears = _linears(block)
            self._layers[spec.name] = [f"{spec.name}.{name}" for name in linears]
            handles.append(block.register_forward_pre_hook(self._enter(spec.name)))
            handles += [
                m.register_forward_hook(self._see(spec.name, f"{spec.name}.{n}")) for n, m in linears.items()
            ]
        with hooked(*handles):
            yield

    def scores(self) -> CallScores:
        """What was recorded; layers in the order of their first call."""
        names = [
            *self._pieces,
            *(n for block in self._n_calls for n in self._layers[block] if n not in self._pieces),
        ]
        blocks = {name: block for block, layers in self._layers.items() for name in layers}
        made: CallScores = {}
        for name in names:
            calls = self._pieces.get(name, [])
            calls = calls + [[] for _ in range(self._n_calls[blocks[name]] - len(calls))]
            made[name] = [torch.cat(pieces) if pieces else torch.zeros(0) for pieces in calls]
        return made

    def _enter(self, block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            self._n_calls[block] = self._n_calls.get(block, 0) + 1

        return hook

    def _see(self, block: str, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = in_graph(output)
            calls = self._pieces.setdefault(name, [])
            calls += [[] for _ in range(self._n_calls[block] - len(calls))]
            pieces = calls[-1]
            number = len(pieces)
            pieces.append(torch.zeros(output.numel() // output.shape[-1]))

            def take(gradient: Tensor) -> None:
                pieces[number] = self._reduce(gradient.detach().float()).flatten().cpu()

            output.register_hook(take)
            return output

        return hook
