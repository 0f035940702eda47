"""Saliency by attention received: tokens that later tokens look at count more.

With A the attention weights of a block, and K_t the number of tokens that query t may attend to,

    s_n = mean over heads of sum_t A[t, n] / sum_{t may attend to n} 1 / K_t,

t running over the valid queries, n itself included: the attention received as a multiple of what n would receive if
every query spread its attention evenly. So the early tokens of a causal model, which have more later queries and
share them with fewer tokens, have no head start. All linear layers of the block share the scores. In VLMQ's ablation
attention scores did worse than uniform weights.

The weights are read where they arise, by intercepting `scaled_dot_product_attention` and the softmax of eager
attention during one run of the block: masks keep the meaning that they have there, and no config is touched. Fused
kernels of other kinds (flash attention) do not go through either and are an error.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vlmq.calib.block import Block, BlockCall
from vlmq.calib.saliency import SaliencyContext
from vlmq.calib.saliency_residual import attention_modules
from vlmq.calib.saliency_tokens import finish, ones
from vlmq.calib.tokens import PADDING

logger = logging.getLogger(__name__)

QUERY_CHUNK = 256
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def attn_received(block: Block, context: SaliencyContext) -> dict[str, list[Tensor]]:
    """Mean attention that each token receives, see the module; uniform for layers that see other tokens.

    Blocks without attention have uniform weights, and so, with a warning, have mixers without attention weights
    (linear attention). At the peak the weights of 256 queries, (rows, n_heads, 256, n_tokens), are on the device.

    Raises:
        RuntimeError: the block's attention does not show its weights.
    """
    raw = ones(block)
    mixers = attention_modules(block.original)
    classes = {type(m).__name__ for module in mixers.values() for m in module.modules()}
    for i, call in enumerate(block.inputs if mixers else []):
        kinds = block.batches[i]
        received = _listen(block, call, kinds)
        if not received and not any("Attention" in name for name in classes):
            names = ", ".join(sorted(type(module).__name__ for module in mixers.values()))
            logger.warning("%s: %s has no attention weights, its saliency is uniform", block.spec.name, names)
            break
        scores = _align(received, kinds)
        if scores is None:
            raise RuntimeError(
                f"saliency 'attn_received', block {block.spec.name!r}: expected attention weights over tokens "
                f"{tuple(kinds.shape)}, got {sorted({tuple(r.shape) for r in received}) or 'none'}; load the "
                "model with attn_implementation='sdpa' or 'eager', or choose another saliency"
            )
        for calls in raw.values():
            if calls[i].numel() == scores.numel():
                calls[i] = scores
    return finish(block, context, raw, saliency="attn_received")


def _listen(block: Block, call: BlockCall, kinds: Tensor) -> list[Tensor]:
    """The attention received by the keys, (rows, n_keys), of each self-attention in one call of the block."""
    with torch.no_grad(), _Listener(kinds != PADDING) as listener:
        block.run(call, original=True)
    return listener.received


def _align(received: list[Tensor], kinds: Tensor) -> Tensor | None:
    """The scores of the block's tokens, (n_tokens,), or None if the keys were other tokens."""
    whole = [scores for scores in received if scores.shape == kinds.shape]
    if whole:
        return torch.stack(whole).mean(dim=0).flatten()
    # One call per image or window of a packed sequence, in the order of its tokens.
    pieces = [scores for scores in received if len(scores) == len(kinds) == 1]
    if pieces and sum(scores.numel() for scores in pieces) == kinds.numel():
        return torch.cat(pieces, dim=1).flatten()
    return None


class _Listener(TorchFunctionMode):
    """Notes the attention received by the keys, (rows, n_keys), of every self-attention that runs under it."""

    def __init__(self, valid: Tensor) -> None:
        super().__init__()
        self.received: list[Tensor] = []
        self._valid = valid

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            output = func(*args, **kwargs)
            self._note(_weights_of_sdpa(*args, **kwargs))
            return output
        output = func(*args, **kwargs)
        if func in SOFTMAX and output.ndim == 4:
            self._note((part, part > 0) for part in output.split(QUERY_CHUNK, dim=2))
        return output

    def _note(self, chunks: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Sum up chunks of (weights (rows, n_heads, n_queries, n_keys), which of them are allowed)."""
        total: Tensor | None = None
        even_total: Tensor | None = None
        start = 0
        for weights, allowed in chunks:
            rows, _, n_queries, n_keys = weights.shape
            queries = torch.ones(rows, n_queries, 1, device=weights.device)
            if self._valid.shape == (rows, n_keys):
                queries = self._valid[:, start : start + n_queries, None].to(weights)
            start += n_queries
            received = (weights.float().nan_to_num().mean(dim=1) * queries).sum(dim=1)
            may = allowed.any(dim=1).float()
            even_share = (may * queries / may.sum(dim=-1, keepdim=True).clamp(min=1)).sum(dim=1)
            total = received if total is None else total + received
            even_total = even_share if even_total is None else even_total + even_share
        if total is not None and even_total is not None and start == total.shape[-1]:
            self.received.append((total / torch.where(even_total > 0, even_total, 1.0)).cpu())


def _weights_of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The attention weights that `scaled_dot_product_attention` uses, in chunks of queries, and where they may be > 0.

    `value`, `dropout_p` and `enable_gqa` are there for its signature.
    """
    if query.ndim != 4:
        return
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    n_queries, n_keys = query.shape[2], key.shape[2]
    allowed = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=query.device)
    bias = torch.zeros(1, 1, 1, 1, device=query.device)
    if is_causal:
        allowed = allowed.tril()
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask.expand(*(1,) * (4 - attn_mask.ndim), *attn_mask.shape)
    elif attn_mask is not None:
        bias = attn_mask.float().expand(*(1,) * (4 - attn_mask.ndim), *attn_mask.shape)
        allowed = bias > torch.finfo(attn_mask.dtype).min / 2
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    for start in range(0, n_queries, QUERY_CHUNK):
        part = slice(start, start + QUERY_CHUNK)
        logits = query[:, :, part].float() @ key.float().mT * factor
        logits = logits + (bias[:, :, part] if bias.shape[2] > 1 else bias)
        may = (allowed[:, :, part] if allowed.shape[2] > 1 else allowed).expand(*logits.shape)
        yield logits.masked_fill(~may, -torch.inf).softmax(dim=-1), may
