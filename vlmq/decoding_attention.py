"""Attention of new tokens in C, as the attention "vlmq" of transformers' registry.

Torch's product for bfloat16 is made for many queries and takes long for one. One new token of each sequence is
computed by `vlmq.kernels.attention`, all else by "sdpa".
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmq.kernels import attention as kernel
from vlmq.kernels.ops import runs_plainly

NAME = "vlmq"
CHANGING = ("position_bias", "softcap", "s_aux", "cache")
"""Arguments of an attention that change what it computes."""


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


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
