"""Packed experts in vLLM on a CPU, whose kernel for them asks for AMX: loaded by vLLM, multiplied in PyTorch.

vLLM's own code finds the scheme of the experts, makes their parameters and fills them from the checkpoint. Only the
kernel is another one: the weights are unpacked as vLLM's parameters say, and each expert computes

    y = down (silu(gate x) * up x)

What is compared is thus the reading of names, order and scheme, and the routing; not a kernel of vLLM's.
"""

from typing import Any

import torch
from torch import Tensor


def replace_kernel() -> None:
    """Let vLLM, in this process, compute packed experts of symmetric groups in PyTorch."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # pyright: ignore[reportMissingImports]
        compressed_tensors_moe_wna16 as there,
    )

    method = there.CompressedTensorsWNA16MoEMethod
    there.select_wna16_moe_backend = lambda **_: (there.WNA16MoEBackend.TRITON, None)
    method.process_weights_after_loading = unpack_all
    method.apply = apply
    method.is_monolithic = False


def unpack_all(method: Any, layer: Any) -> None:
    """In place of the packing for a kernel: keep the weights of both projections, dense."""
    bits = method.num_bits
    layer.dense = tuple(
        unpack(getattr(layer, f"{part}_weight_packed"), getattr(layer, f"{part}_weight_scale"), bits)
        for part in ("w13", "w2")
    )


def unpack(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Weights (n_experts, out_features, in_features) of vLLM's parameters, in the dtype of the scales.

    Args:
        packed: (n_experts, out_features, in_features bits / 32) int32, whole numbers from the lowest bits on.
        scales: (n_experts, out_features, n_groups).
        bits: 2, 4 or 8.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = ((packed.data[..., None] >> shifts) & (2**bits - 1)).flatten(-2) - 2 ** (bits - 1)
    groups = values.unflatten(-1, (scales.shape[-1], -1)).to(scales.dtype)
    return (groups * scales.data[..., None]).flatten(-2)


def apply(
    method: Any,
    layer: Any,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_experts: Any = None,
    shared_experts_input: Tensor | None = None,
) -> Tensor:
    """In place of the kernel: the sum of what the chosen experts make of each token, (n_tokens, in_features).

    Args:
        method: vLLM's, not needed.
        layer: after `unpack_all`.
        x: (n_tokens, in_features).
        topk_weights: (n_tokens, n_chosen).
        topk_ids: (n_tokens, n_chosen), the chosen experts.
        shared_experts: none of the models here has them.
        shared_experts_input: for these.
    """
    assert shared_experts is None, "shared experts"
    first, last = layer.dense
    out = torch.zeros_like(x)
    for number in topk_ids.unique().tolist():
        token, place = (topk_ids == number).nonzero(as_tuple=True)
        gate, up = (x[token] @ first[number].T).chunk(2, dim=-1)
        made = (torch.nn.functional.silu(gate) * up) @ last[number].T
        out.index_add_(0, token, (made * topk_weights[token, place, None]).to(out.dtype))
    return out
