"""Packed layers that read the same input, computed in one call.

The projections of queries, keys and values are called one after the other with one x, and so are gate and up. Together
they prepare x once and wake the threads once. Neither the model's code nor its checkpoint has to know: the layers of a
module that are equally wide share a `SharedInput`, which learns from the calls who follows whom with the same x. When
the first of them is called again, the others are computed with it, and each takes its result when it is called.

A result is handed out only to a call whose x has the shape, the dtype and every byte of the x that it was computed
from. A layer that does not come after all ends the sharing of its first. Results are those of the layers alone, bit by
bit. It serves few tokens at a time, as in decoding, on a backend that can compute layers together.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmq.kernels.backends import BoundLayer

MAX_BYTES = 2**16
Joined = Callable[[Tensor], list[Tensor]]
Key = tuple[torch.Size, torch.dtype, bool, bytes]


class Layer(Protocol):
    """A layer that may be computed ahead of its call."""

    def bound_to(self, x: Tensor) -> BoundLayer | None:
        """Return the layer as its backend's function of x."""
        ...


class SharedInput:
    """What is known of the layers of one module: who follows whom, and results that wait to be taken."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know nothing, as at the start: for layers whose weights change."""
        self._followers: dict[Layer, tuple[Layer, ...]] = {}
        self._joined: dict[tuple[BoundLayer, ...], Joined | None] = {}
        self._run: list[Layer] = []  # called with the input of `_key`, in order
        self._key: Key | None = None
        # One object, read and replaced at once: a result never meets the input of another thread.
        self._ready: tuple[Key, dict[Layer, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return SharedInput().__dict__

    def take(self, layer: Layer, x: Tensor) -> Tensor | None:
        """Return the result that waits for a call of the layer with x; None if none does."""
        ready = self._ready
        if ready is None or layer not in ready[1] or x.nbytes > MAX_BYTES or not x.is_contiguous():
            return None
        return ready[1].pop(layer, None) if _key_of(x) == ready[0] else None

    def apply(self, layer: Layer, bound: BoundLayer, x: Tensor) -> Tensor:
        """Return what `bound(x)` would; `bound` is the layer's and takes x, and no result waits for it."""
        if x.nbytes > MAX_BYTES or not x.is_contiguous():
            return bound(x)
        key, ready = _key_of(x), self._ready
        follows = key == self._key
        if ready is not None and ready[0] != key:
            self._ready = None
            if ready[1] and self._run:
                self._followers[self._run[0]] = ()
        if follows and layer not in self._run:
            self._run.append(layer)
            return bound(x)
        if self._run:
            self._followers.setdefault(self._run[0], tuple(self._run[1:]))
        self._run, self._key = [layer], key
        followers = self._followers.get(layer)
        return self._compute(layer, followers, bound, x, key) if followers else bound(x)

    def _compute(
        self, layer: Layer, followers: tuple[Layer, ...], bound: BoundLayer, x: Tensor, key: Key
    ) -> Tensor:
        others = tuple(b for follower in followers if (b := follower.bound_to(x)) is not None)
        joined = self._join(bound, others) if len(others) == len(followers) else None
        if joined is None:
            self._followers[layer] = ()
            return bound(x)
        results = joined(x)
        self._ready = key, dict(zip(followers, results[1:], strict=True))
        return results[0]

    def _join(self, bound: BoundLayer, others: tuple[BoundLayer, ...]) -> Joined | None:
        layers, known = (bound, *others), self._joined
        if layers not in known:
            self._joined = known = {layers: bound.join(others)}
        return known[layers]


def _key_of(x: Tensor) -> Key:
    return x.shape, x.dtype, torch.is_inference_mode_enabled(), ctypes.string_at(x.data_ptr(), x.nbytes)
