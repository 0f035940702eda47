"""A dynamic cache whose keys and values grow in place: transformers' own copies all of them for each token."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MIN_ROOM = 128


class Room:
    """A tensor of tokens with room at its end."""

    def __init__(self) -> None:
        self.room: Tensor | None = None
        self.shown: Tensor | None = None

    def extend(self, old: Tensor, new: Tensor) -> Tensor:
        """Return `old` (..., n, d) and `new` (..., m, d) as one; what was returned before is not copied again."""
        room, n = self.room, old.shape[-2]
        end = n + new.shape[-2]
        if room is None or self.shown is not old or end > room.shape[-2] or _is_closed(room):
            room = old.new_empty((*old.shape[:-2], end + max(MIN_ROOM, end // 4), old.shape[-1]))
            room[..., :n, :] = old
        room[..., n:end, :] = new
        self.room, self.shown = room, room[..., :end, :]
        return self.shown

    def has_room(self, old: Tensor) -> bool:
        """Say whether `old` is what was returned last, and one more token may be written behind it."""
        room = self.room
        return (
            room is not None and self.shown is old and old.shape[-2] < room.shape[-2] and not _is_closed(room)
        )

    def show_one_more(self) -> Tensor:
        """Return all tokens with one more, which was written behind them."""
        room, shown = cast(Tensor, self.room), cast(Tensor, self.shown)
        self.shown = room.narrow(-2, 0, shown.shape[-2] + 1)
        return self.shown


class GrowingLayer(DynamicLayer):
    """transformers' dynamic layer of a cache, which keeps room for tokens to come: at least 128, or a quarter more."""

    # It must not take the place of the layer that it derives from in transformers' table.
    _layer_type = None

    def __init__(self, layer: DynamicLayer | None = None) -> None:
        super().__init__()
        for name, value in vars(layer).items() if layer is not None else ():
            setattr(self, name, value)
        self._rooms = Room(), Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; return all."""
        old, new = (self.keys, self.values), (key_states, value_states)
        if self.get_seq_length() == 0 or not all(_is_plain(t) for t in (*old, *new)):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = (
            r.extend(cast(Tensor, a), b) for r, a, b in zip(self._rooms, old, new, strict=True)
        )
        return self.keys, self.values

    def room_for_one(self) -> tuple[Tensor, Tensor, int] | None:
        """Return tensors of keys and values with room for one more token, and how many tokens they hold.

        None where there is no room: an `update` makes some. Who has written the token calls `advance`.
        """
        keys, values = self._rooms
        if self.keys is None or not (keys.has_room(self.keys) and values.has_room(cast(Tensor, self.values))):
            return None
        return cast(Tensor, keys.room), cast(Tensor, values.room), self.keys.shape[-2]

    def advance(self) -> None:
        """Hold one token more, which somebody has written into the room."""
        self.keys, self.values = (room.show_one_more() for room in self._rooms)


def grow_cache(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a forward: let the layers of its dynamic cache grow in place."""
    known = kwargs.get("past_key_values")
    if type(known) is not DynamicCache or known.offloading or torch.compiler.is_compiling():
        return
    if known.layer_class_to_replicate is DynamicLayer:
        known.layer_class_to_replicate = GrowingLayer
    layers = known.layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i] = GrowingLayer(layer)


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_cpu and not (torch.is_grad_enabled() and tensor.requires_grad)


def _is_closed(room: Tensor) -> bool:
    """Whether torch would refuse to write into it: it was made in inference mode, which has ended."""
    return room.is_inference() and not torch.is_inference_mode_enabled()
