"""Attention of one new token over the keys and values so far, in C (csrc/attention.h).

    out[b, h] = sum_t p[b, h, t] v[b, h', t],    p = softmax over t of scale * (q[b, h] . k[b, h', t]),    h' = h // n

with n heads of queries for each head of keys. It is what a layer computes for each generated token. Sums are in
float32 and rounded once at the end; neither the number of threads nor the sequences beside change a bit.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from vlmq.kernels.cpu import DTYPES
from vlmq.kernels.library import choose_isa, isa_names, open_library

MULTIPLE = 16
"""Sizes of heads that the kernels take."""


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Say whether `attend` computes this.

    It does for one token of each sequence, on a CPU, without gaps between the numbers of a head, and a mask that is
    either none or boolean.
    """
    if q.shape[-2] != 1 or not (q.is_cpu and k.is_cpu and v.is_cpu) or q.dtype not in DTYPES:
        return False
    (n_batch, n_heads, _, head_dim), (_, n_kv_heads, n_keys, value_dim) = q.shape, v.shape
    return (
        k.dtype == v.dtype == q.dtype
        and k.shape == (n_batch, n_kv_heads, n_keys, head_dim)
        and v.shape[0] == n_batch
        and n_keys > 0
        and n_heads % n_kv_heads == 0
        and head_dim % MULTIPLE == value_dim % MULTIPLE == 0
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and (mask is None or is_plain_mask(mask, n_batch, n_heads, n_keys))
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, isa: str | None = None
) -> Tensor:
    """Attend with one token of each sequence; only for what `takes`.

    Args:
        q: (n_batch, n_heads, 1, head_dim) in float32, bfloat16 or float16.
        k: (n_batch, n_kv_heads, n_keys, head_dim), of any strides but the last.
        v: (n_batch, n_kv_heads, n_keys, value_dim), of any strides but the last.
        mask: (n_batch or 1, n_heads or 1, 1, n_keys) bool, True where a key is seen; None sees all. A token that
            sees nothing gives zeros.
        scale: what products are multiplied with.
        isa: an instruction set that this CPU has; the fastest, or the one of VLMQ_CPU_ISA, unless told.

    Returns:
        (n_batch, 1, n_heads, value_dim) in the dtype of q.
    """
    library = open_library()
    assert not isinstance(library, str)
    n_batch, n_heads, _, head_dim = q.shape
    n_keys, value_dim = v.shape[-2:]
    out = q.new_empty((n_batch, 1, n_heads, value_dim))
    steps = q.stride(), k.stride(), v.stride()
    masked = (0, 0) if mask is None else [mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 1)]
    sizes = _SIZES(
        n_batch,
        n_heads,
        k.shape[1],
        n_keys,
        head_dim,
        value_dim,
        *steps[0][:2],
        *steps[1][:3],
        *steps[2][:3],
        *masked,
    )
    places = (
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
    )
    index = isa_index(isa)
    if library.vlmq_attend(*places, sizes, scale, DTYPES[q.dtype], index, torch.get_num_threads()):
        raise MemoryError(f"no memory for attention over {n_keys} keys")
    return out


_SIZES = ctypes.c_int64 * 16


def is_plain_mask(mask: Tensor, n_batch: int, n_heads: int, n_keys: int) -> bool:
    """Say whether this is a mask (n_batch or 1, n_heads or 1, 1, n_keys) that the kernels read."""
    if mask.dtype != torch.bool or mask.dim() != 4 or not mask.is_cpu or mask.stride(-1) != 1:
        return False
    a, b, c, d = mask.shape
    return a in (1, n_batch) and b in (1, n_heads) and c == 1 and d == n_keys


@cache
def isa_index(isa: str | None) -> int:
    """Return the place of an instruction set in the library's list; of the one in use for None."""
    library = open_library()
    assert not isinstance(library, str)
    return isa_names(library).index(choose_isa(library, isa))
