"""Packed layers that one module calls with the same input, in one launch: queries, keys and values; gate and up.

On a GPU a layer of a few hundred outputs is too small to keep all processors busy, and each launch of a kernel costs
some microseconds, which is what a small layer takes. So the first of such layers to be called computes all of them
(`torch.ops.vlmq.quant_linears`), and the others take their results when they are called. The checkpoint and the
model's code stay as they are. Which layers belong together is read from the code (`vlmq.calls`), so that it holds in a
compiled or captured graph from the first token on.

A result is handed out only for the very tensor that it was computed from, unchanged as far as torch counts changes
(it does not in inference mode), and only once. On a CPU, `vlmq.siblings` does the same by comparing bytes; there this
is for compiled graphs.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmq.calls import runs_of_calls
from vlmq.formats import Format
from vlmq.kernels.ops import quant_linears, runs_plainly, wants_gradient

MAX_TOKENS = 256
"""Most tokens of a launch: of more, the weights are unpacked for each layer by itself, and one launch saves nothing."""

MAX_MISSED = 3
"""As often in a row results may be left before the layers are computed one by one for good."""


class Layer(Protocol):
    """What is read of a packed layer."""

    format: Format
    in_features: int
    group_size: int | None
    _parameters: dict[str, nn.Parameter | None]


class JointLayers:
    """Layers in the order of their calls, and results that wait to be taken."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._missed = 0
        # One object, read and replaced at once: a result never meets the input of another thread.
        self._waiting: tuple[Tensor, int | None, list[Tensor | None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_waiting": None}

    def forget(self) -> None:
        """Hand out no result that waits: for layers whose weights change."""
        self._waiting = None

    def apply(self, layer: Layer, x: Tensor) -> Tensor | None:
        """Return the result of a call of the layer with x; None if the layer is to be computed alone."""
        if layer is self.layers[0]:
            return self._compute(x)
        waiting = self._waiting
        if waiting is None or waiting[0] is not x or waiting[1] != _changes(x):
            return None
        if layer is self.layers[-1]:
            self._waiting = None
            if self._missed:
                self._missed = 0
        results = waiting[2]
        for i, one in enumerate(self.layers):
            if one is layer:
                result, results[i] = results[i], None
                return result
        return None

    def _compute(self, x: Tensor) -> Tensor | None:
        """Apply all layers; None where they would have to be computed one by one, or a gradient is wanted."""
        if self._waiting is not None:
            self._missed += 1
            self._waiting = None
        first = self.layers[0]
        parts = [layer._parameters for layer in self.layers]
        is_many = x.numel() > MAX_TOKENS * first.in_features
        if self._missed >= MAX_MISSED or is_many or not self._fit(x, parts):
            return None
        qweights = _tensors(parts, "qweight")
        others = _tensors(parts, "scales"), _tensors(parts, "zeros"), _tensors(parts, "bias")
        y = quant_linears(x, qweights, *others, first.format.name, first.in_features, first.group_size or 0)
        results = _parted(y, x, qweights)
        self._waiting = x, _changes(x), results
        return results[0]

    def _fit(self, x: Tensor, parts: Sequence[dict[str, nn.Parameter | None]]) -> bool:
        biases = [own["bias"] for own in parts]
        differentiable = [*biases, *_tensors(parts, "scales")]
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting() or wants_gradient(x, differentiable):
                return False
        elif not runs_plainly(x, differentiable):
            return False
        # Of layers that are moved to the device for their calls only, the later ones are elsewhere yet.
        is_here = all(weight.device == x.device for weight in _tensors(parts, "qweight"))
        return is_here and len({None if bias is None else bias.dtype for bias in biases}) == 1


def joint_layers(module: nn.Module, layers: Mapping[str, Layer]) -> list[JointLayers]:
    """Return which of the layers, children of the module by name, its code calls with one input; none is in two."""
    found, left = [], dict(layers)
    for run in runs_of_calls(type(module).forward):
        for is_packed, names in groupby(run, left.__contains__):
            if not is_packed:  # what it is may change the input
                continue
            alike: dict[tuple[object, ...], list[Layer]] = {}
            for layer in [left.pop(name) for name in names]:
                has_bias = layer._parameters["bias"] is not None
                kind = (layer.format.name, layer.in_features, layer.group_size, has_bias)
                alike.setdefault(kind, []).append(layer)
            found += [JointLayers(group) for group in alike.values() if len(group) > 1]
    return found


def _changes(x: Tensor) -> int | None:
    """How often the values of x were changed; None where torch does not count."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _tensors(parts: Sequence[dict[str, nn.Parameter | None]], name: str) -> list[Tensor]:
    """That part of each layer, of those that have it."""
    return [tensor for tensor in (own[name] for own in parts) if tensor is not None]


def _parted(y: Tensor, x: Tensor, qweights: Sequence[Tensor]) -> list[Tensor | None]:
    """Part what `quant_linears` returns: (..., out_features) of each layer."""
    widths, n_tokens = [qweight.shape[0] for qweight in qweights], math.prod(x.shape[:-1])
    parts = y.split([n_tokens * width for width in widths])
    return [part.view(*x.shape[:-1], width) for part, width in zip(parts, widths, strict=True)]
