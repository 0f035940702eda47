"""A dense layer of few tokens on a CPU, in C (csrc/dense.h).

    y[n, o] = sum_i w[o, i] x[n, i] + bias[o]

A packed model often keeps its output head dense, the largest of its matrices: reading it takes a good part of a
token's time, and torch's product for bfloat16 and float16 reads it at a fraction of what the memory gives. Sums are
in float32 and rounded once; neither the number of threads nor the tokens beside change a bit.
"""

import torch
from torch import Tensor

from vlmq.kernels.attention import isa_index
from vlmq.kernels.cpu import DTYPES
from vlmq.kernels.library import open_library

MAX_TOKENS = 4
HALVES = (torch.bfloat16, torch.float16)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether `dense` computes this: up to 4 tokens in bfloat16 or float16 on a CPU, without gaps."""
    return (
        x.dtype in HALVES
        and weight.dim() == 2
        and 0 < x.numel() <= MAX_TOKENS * weight.shape[1]
        and x.shape[-1] == weight.shape[1]
        and len(weight) > 0
        and all(
            t is None or (t.dtype == x.dtype and t.is_cpu and t.is_contiguous()) for t in (x, weight, bias)
        )
        and (bias is None or bias.shape == weight.shape[:1])
    )


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, *, isa: str | None = None) -> Tensor:
    """Apply a dense layer; only for what `takes`.

    Args:
        x: (..., in_features) in bfloat16 or float16.
        weight: (out_features, in_features) in the dtype of x.
        bias: (out_features,) in the dtype of x, or None.
        isa: an instruction set that this CPU has; the fastest, or the one of VLMQ_CPU_ISA, unless told.

    Returns:
        (..., out_features) in the dtype of x.
    """
    library = open_library()
    assert not isinstance(library, str)
    (out_features, in_features), n_tokens = weight.shape, x.numel() // weight.shape[1]
    out = x.new_empty((*x.shape[:-1], out_features))
    places = [None if t is None else t.data_ptr() for t in (x, weight, bias, out)]
    sizes = n_tokens, in_features, out_features
    if library.vlmq_dense(*places, *sizes, DTYPES[x.dtype], isa_index(isa), torch.get_num_threads()):
        raise MemoryError(f"no memory for {n_tokens} tokens of {in_features} inputs")
    return out
