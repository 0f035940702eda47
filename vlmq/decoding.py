"""Faster generation on a CPU: attention of new tokens in C, and a cache that grows without being copied.

With packed layers, what is left of the time of a token is in good part attention: torch's product for bfloat16 is made
for many queries and takes long for one, and transformers' dynamic cache copies all keys and values for each token. A
packed model whose attention is "sdpa" therefore gets the attention "vlmq" of transformers' registry: one new token of
each sequence is computed by `vlmq.kernels.attention`, all else by "sdpa" as before. The layers of a `DynamicCache` that
its forward is given become `GrowingLayer`. A family whose code asks for "sdpa" by name keeps its attention, and
`model.set_attn_implementation("sdpa")` gives it back.
"""

import inspect
import re
import sys
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmq.kernels import attention as kernel
from vlmq.kernels.cpu import missing_library
from vlmq.kernels.ops import runs_plainly

NAME = "vlmq"
CHANGING = ("position_bias", "softcap", "s_aux", "cache")
"""Arguments of an attention that change what it computes."""
MIN_ROOM = 128


def prepare_decoding(model: nn.Module) -> None:
    """Let a packed model generate faster on a CPU, where there are C kernels; its results differ by rounding only."""
    if missing_library() is not None or not isinstance(model, PreTrainedModel):
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _may_change(module):
            module.config._attn_implementation_internal = NAME
    if grow_cache not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(grow_cache, with_kwargs=True)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' "sdpa" does, one new token of each sequence in C.

    Args:
        module: the attention layer.
        query: (n_batch, n_heads, n_tokens, head_dim).
        key: (n_batch, n_kv_heads, n_keys, head_dim).
        value: (n_batch, n_kv_heads, n_keys, value_dim).
        attention_mask: (n_batch or 1, 1, n_tokens, n_keys) bool, True where a key is seen, or what "sdpa" takes.
        dropout: as "sdpa" takes it.
        scaling: of the products; 1 / sqrt(head_dim) unless told.
        kwargs: as "sdpa" takes them.

    Returns:
        (n_batch, n_tokens, n_heads, value_dim), and no weights.
    """
    if (
        kernel.takes(query, key, value, attention_mask)
        and dropout == 0.0
        and all(kwargs.get(name) is None for name in CHANGING)
        and runs_plainly(query, (key, value, None, None))
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernel.attend(query, key, value, attention_mask, scale), None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, None


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


def _may_change(model: PreTrainedModel) -> bool:
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    return not _asks_for_sdpa(type(model).__module__)


@cache
def _asks_for_sdpa(module: str) -> bool:
    """Whether the code of a family compares the name of its attention with "sdpa"."""
    try:
        return re.search(r"""["']sdpa["']""", inspect.getsource(sys.modules[module])) is not None
    except (OSError, TypeError, KeyError):
        return True


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
