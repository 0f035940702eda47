"""Layers of other formats, read exactly: compressed-tensors "pack-quantized", GPTQ and AWQ.

    W[o, i] = s[o, g(i)] (c[o, i] - z[o, g(i)])        c, z in [0, 2^bits)

    compressed-tensors  weight_packed (out, words), weight_zero_point (words, groups), streams of v + 2^(bits-1)
    GPTQ                qweight (words, out), qzeros (groups, words), streams along in and out; version 1 stores z - 1
    AWQ                 qweight (in, out / 8), qzeros (groups, out / 8), 4 bits, columns of a word in the order below

Each becomes `int<bits>` or, where all z are 2^(bits-1), `int<bits>-sym`; 5 to 7 bits become 8. Refused, with the
reason: scales that float16 cannot hold, inputs in an order of their own (`g_idx` of act-order), groups that are no
multiple of 16.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vlmq.formats import GROUP_SIZES, QuantizedWeight, get_format
from vlmq.words import from_words

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = Mapping[str, Tensor]


def read_compressed(tensors: Tensors, in_features: int, bits: int) -> QuantizedWeight:
    """Read a layer of compressed-tensors; `bits` as its config says.

    Raises:
        ValueError: what vlmq cannot say, see above.
    """
    if "weight_g_idx" in tensors:
        raise ValueError("its inputs are grouped in an order of their own (weight_g_idx)")
    codes = from_words(tensors["weight_packed"], bits, in_features)
    zeros = None
    if "weight_zero_point" in tensors:
        zeros = from_words(tensors["weight_zero_point"].T, bits, codes.shape[0]).T
    return _weight(codes, tensors["weight_scale"], zeros, bits)


def read_gptq(tensors: Tensors, in_features: int, bits: int, *, zero_offset: int) -> QuantizedWeight:
    """Read a layer of GPTQ; `zero_offset` is what was taken from the zero points: 1 in version 1, 0 in version 2.

    Raises:
        ValueError: what vlmq cannot say, see above.
    """
    scales = tensors["scales"].T
    codes = from_words(tensors["qweight"].T, bits, in_features)
    stored = from_words(tensors["qzeros"], bits, codes.shape[0]).T
    if zero_offset and bool((stored == 2**bits - 1).any()):
        raise ValueError(
            "version 1 stores zero points less one, and some of its zero points have wrapped around"
        )
    if "g_idx" in tensors:
        size = -(-in_features // scales.shape[1])
        expected = torch.arange(in_features, device=codes.device) // size
        if not torch.equal(tensors["g_idx"].long(), expected):
            raise ValueError("its inputs are grouped in an order of their own (act-order, g_idx)")
    return _weight(codes, scales, stored + zero_offset, bits)


def read_awq(tensors: Tensors, in_features: int, bits: int) -> QuantizedWeight:
    """Read a layer of AWQ ("gemm").

    Raises:
        ValueError: what vlmq cannot say, see above.
    """
    if bits != 4:
        raise ValueError(f"AWQ is read at 4 bits, this layer has {bits}")
    codes = _awq_columns(tensors["qweight"]).T.contiguous()
    if codes.shape[1] != in_features:
        raise ValueError(f"expected {in_features} inputs, the layer has {codes.shape[1]}")
    return _weight(codes, tensors["scales"].T, _awq_columns(tensors["qzeros"]).T, bits)


def _awq_columns(words: Tensor) -> Tensor:
    """(rows, out / 8) int32 -> (rows, out) uint8, columns in their order."""
    in_word = from_words(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))
    return in_word[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def _weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> QuantizedWeight:
    """Put codes (out, in), scales and zeros (out, groups) into the nearest format of vlmq that says the same."""
    half = scales.half()
    if not torch.equal(half.to(scales.dtype), scales) or not bool(half.isfinite().all()):
        raise ValueError("float16, in which vlmq stores scales, cannot hold its scales")
    if bits in (5, 6, 7):
        shift = 128 - 2 ** (bits - 1)
        codes, zeros, bits = codes + shift, None if zeros is None else zeros + shift, 8
    middle = 2 ** (bits - 1)
    is_symmetric = zeros is None or bool((zeros == middle).all())
    if bits == 1 and zeros is None:
        zeros, is_symmetric = torch.full_like(half, 1, dtype=torch.uint8), False
    name = "binary" if bits == 1 else f"int{bits}-sym" if is_symmetric else f"int{bits}"
    fmt = get_format(name)
    size, repeats = _group_size(codes.shape[1], half.shape[1])
    stored = None
    if fmt.has_zero:
        assert zeros is not None
        stored = (zeros.int() * 2 ** (8 - bits)).to(torch.uint8).repeat_interleave(repeats, 1).contiguous()
    scales = half.repeat_interleave(repeats, 1)[..., None].contiguous()
    return QuantizedWeight(codes.contiguous(), scales, stored, fmt, size)


def _group_size(in_features: int, n: int) -> tuple[int | None, int]:
    """The group size of vlmq, and how often each scale is repeated for it."""
    if n == 1:
        return None, 1
    size = in_features // n
    fits = [g for g in GROUP_SIZES if g is not None and size % g == 0]
    if in_features % n or not fits:
        raise ValueError(f"{n} groups over {in_features} inputs are no groups of a multiple of 16")
    return max(fits), size // max(fits)


Reader = Callable[[Tensors, int, int], QuantizedWeight]
