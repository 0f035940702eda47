"""Decoder layers computed before they are called: the first computes those that follow it in the same call.

A token of a small model spends as long in Python, between one layer and the next, as in the layers. Where the code of a
model is known to hand on what a layer gives to the next one and to do nothing else between (`vlmq.known_code`),
`ModelStep` takes the place of its forward: it does what that does, and lets the steps of its layers
(`vlmq.decoder_step`) know who follows them. What a step has computed for others waits in a `Run`, for the time of the
forward. They give it out if they are called with the very tensor that the layer before gave, and with the same mask,
cache and positions; for anything else, as Qwen3-VL hands on where pictures come late, a layer is computed anew.
"""

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from vlmq.growing_cache import GrowingLayer
from vlmq.known_code import is_plain_loop


class Run:
    """The layers of a model during one forward, and what of them is computed already."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._may_look_ahead = True
        self._shared: tuple[object, ...] = ()
        self._x: Tensor | None = None
        self._ahead: list[tuple[nn.Module, GrowingLayer, Tensor]] = []

    def after(self, layer: nn.Module) -> list[nn.Module]:
        """Return the layers that the model calls after this one."""
        layers = self._model._modules["layers"]
        if not self._may_look_ahead or type(layers) is not nn.ModuleList:
            return []
        called = [*layers._modules.values()][: self._model.config.num_hidden_layers]
        return called[called.index(layer) + 1 :] if layer in called else []

    def keep(
        self, x: Tensor, shared: tuple[object, ...], ahead: Sequence[tuple[nn.Module, GrowingLayer, Tensor]]
    ) -> None:
        """Keep what was computed for layers to come.

        Args:
            x: what the first of them will be called with.
            shared: mask, cache and positions, which all will be called with.
            ahead: each layer, its part of the cache, which has the token behind its end, and what it gives.
        """
        self._x, self._shared, self._ahead = x, shared, [*reversed(ahead)]

    def take(self, layer: nn.Module, x: Tensor, shared: tuple[object, ...]) -> Tensor | None:
        """Give what a layer was computed to give, and let its cache have the token; None if it must be computed."""
        if not self._ahead:
            return None
        known, cached, out = self._ahead.pop()
        if known is layer and x is self._x and all(map(is_, shared, self._shared)):
            cached.advance()
            self._x = out
            return out
        # Another model than was thought: all else would be computed for nothing.
        self._ahead, self._may_look_ahead = [], False
        return None


class ModelStep:
    """The forward of a model whose layers follow each other plainly."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelStep, (self.model,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the model's own forward does."""
        forward = type(self.model).forward
        if torch.compiler.is_compiling() or not is_plain_loop(self.model):
            return forward(self.model, *args, **kwargs)
        token = _RUN.set(Run(self.model))
        try:
            return forward(self.model, *args, **kwargs)
        finally:
            _RUN.reset(token)


_RUN: ContextVar[Run | None] = ContextVar("run", default=None)
current_run = _RUN.get


def install_runs(model: nn.Module) -> None:
    """Let models whose code is known say how their decoder layers follow each other."""
    for module in model.modules():
        if "forward" not in module.__dict__ and is_plain_loop(module):
            module.forward = ModelStep(module)
