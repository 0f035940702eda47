"""A dynamic cache whose keys and values grow in place: transformers' own copies all of them for each token."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmq.kernels.decoder import Past

MIN_ROOM = 128


class GrowingLayer(DynamicLayer):
    """transformers' dynamic layer of a cache, which keeps room for tokens to come: at least 128, or a quarter more.

    `keys` and `values` are made of the room when they are asked for. Who sets them, as a crop or a search with beams
    does, ends the room.
    """

    # It must not take the place of the layer that it derives from in transformers' table.
    _layer_type = None

    def __init__(self, layer: DynamicLayer | None = None) -> None:
        self._past: Past | None = None
        self._n_tokens = 0
        self._shown: list[Tensor | None] = [None, None]
        super().__init__()
        for name, value in vars(layer).items() if layer is not None else ():
            setattr(self, name, value)

    @property
    def keys(self) -> Tensor | None:
        """(n_batch, n_heads, n_tokens, head_dim)."""
        return self._show(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._shown, self._past = [keys, self._show(1)], None

    @property
    def values(self) -> Tensor | None:
        """(n_batch, n_heads, n_tokens, value_dim)."""
        return self._show(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._shown, self._past = [self._show(0), values], None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; return all."""
        old, new = [self.keys, self.values], [key_states, value_states]
        if self.get_seq_length() == 0 or not all(_is_plain(t) for t in (*old, *new)):
            return super().update(key_states, value_states, *args, **kwargs)
        (n, n_values), (more, more_values) = (
            [cast(Tensor, t).shape[-2] for t in pair] for pair in (old, new)
        )
        if n != n_values or more != more_values:
            return super().update(key_states, value_states, *args, **kwargs)
        past = self._room_for(more)
        if past is None:
            keys, values = (_with_room(cast(Tensor, t), n + more) for t in old)
            past = Past(keys, values, n)
        for room, states in ((past.keys, key_states), (past.values, value_states)):
            room[..., n : n + more, :] = states
        self._past, self._n_tokens = past, n
        self.advance(more)
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def room_for_one(self) -> Past | None:
        """Return keys and values with room for one more token; who has written it calls `advance`.

        None where there is no room: an `update` makes some.
        """
        return self._room_for(1)

    def advance(self, n_tokens: int = 1) -> None:
        """Hold more tokens, which somebody has written into the room."""
        past = cast(Past, self._past)
        self._n_tokens = past.n_tokens = self._n_tokens + n_tokens
        self._shown = [None, None]

    def _room_for(self, n_tokens: int) -> Past | None:
        """Return the room if these tokens may be written into it: another may share it, who has written already."""
        past = self._past
        if past is None or past.n_tokens != self._n_tokens or past.n_tokens + n_tokens > past.n_room:
            return None
        # Torch would refuse to write into what was made in an inference mode that has ended.
        return None if past.is_inference and not torch.is_inference_mode_enabled() else past

    def _show(self, which: int) -> Tensor | None:
        shown, past = self._shown[which], self._past
        if shown is None and past is not None:
            room = past.values if which else past.keys
            shown = self._shown[which] = room.narrow(-2, 0, self._n_tokens)
        return shown


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


def _with_room(old: Tensor, n_tokens: int) -> Tensor:
    """Return a tensor that begins with these tokens, and has room beyond `n_tokens`."""
    room = old.new_empty((*old.shape[:-2], n_tokens + max(MIN_ROOM, n_tokens // 4), old.shape[-1]))
    room[..., : old.shape[-2], :] = old
    return room
