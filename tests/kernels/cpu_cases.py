"""What the tests of the C kernels share: the instruction sets of this CPU, layers, and a model of 8-bit activations."""

import ctypes

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from vlmq.formats import QuantizedWeight
from vlmq.kernels import cpu
from vlmq.kernels.library import open_library, usable_isas
from vlmq.kernels.packing import BLOCK_SIZE, pack

LIBRARY = open_library()
ISAS = [] if isinstance(LIBRARY, str) else usable_isas(LIBRARY)
needs_library = pytest.mark.skipif(isinstance(LIBRARY, str), reason=str(LIBRARY))


def bound_layer(
    weight: QuantizedWeight,
    isa: str | None = None,
    bias: Tensor | None = None,
    *,
    rounds_prompts: bool = False,
) -> cpu.BoundLayer:
    fmt, group_size = weight.format, weight.group_size or 0
    packed = pack(weight.codes, fmt.bits)
    width = weight.codes.shape[1]
    parts = (packed, weight.scales, weight.zeros, bias)
    return cpu.bind(*parts, fmt.name, width, group_size, isa=isa, rounds_prompts=rounds_prompts)


def random_layer(
    name: str,
    out_features: int,
    in_features: int,
    group_size: int | None,
    isa: str | None = None,
    *,
    rounds_prompts: bool = False,
) -> cpu.BoundLayer:
    weight = random_weight(name, out_features, in_features, group_size)
    return bound_layer(weight, isa, rounds_prompts=rounds_prompts)


def takes_prompts(layer: cpu.BoundLayer) -> bool:
    """Whether its instruction set and format have a kernel for more tokens than a step of decoding has."""
    return layer.plan.most_tokens > cpu.MAX_TOKENS


def multiply(layer: cpu.BoundLayer, x: Tensor, n_threads: int = 1) -> Tensor:
    """What the kernels for rounded activations give for x (n_tokens, in_features) in float32; NaN if unwritten.

    Layers ask it of them for many tokens in half precision only, and only if prompts may be rounded.
    """
    y = torch.full((x.shape[0], layer.out_features), torch.nan)
    out = (ctypes.c_void_p * 1)(y.data_ptr())
    args = (layer.addresses, out, 1, x.data_ptr(), x.shape[0], 0, n_threads)
    assert layer.plan.library.vlmq_linear(*args) == 0
    return y


def rounded(x: Tensor) -> Tensor:
    """The activations that the kernels see, in float64: 8 bits and a scale for each block of 128."""
    blocks = [
        torch.round(block * (torch.full_like(peak, 127) / peak)).double()
        * (peak / torch.full_like(peak, 127)).double()
        for block in x.float().split(BLOCK_SIZE, dim=-1)
        for peak in [block.abs().amax(-1, keepdim=True).clamp_min(1e-30)]
    ]
    return torch.cat(blocks, dim=-1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def is_rounding(difference: Tensor, weight: QuantizedWeight, x: Tensor) -> bool:
    """Whether a result is off by no more than float32 rounds away of what is added up: codes and centres, scaled."""
    largest = weight.format.n_levels * weight.scales.abs().double().amax((1, 2))  # (out_features,)
    bound = 4e-7 * rounded(x).abs().sum(-1, keepdim=True) * largest
    return bool((difference.abs() <= bound + 1e-30).all())
