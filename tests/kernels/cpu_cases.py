"""What the tests of the C kernels share: the instruction sets of this CPU, layers, and a model of 8-bit activations."""

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
    weight: QuantizedWeight, isa: str | None = None, bias: Tensor | None = None
) -> cpu.BoundLayer:
    fmt, group_size = weight.format, weight.group_size or 0
    packed = pack(weight.codes, fmt.bits)
    width = weight.codes.shape[1]
    return cpu.bind(packed, weight.scales, weight.zeros, bias, fmt.name, width, group_size, isa=isa)


def random_layer(
    name: str, out_features: int, in_features: int, group_size: int | None, isa: str | None = None
) -> cpu.BoundLayer:
    return bound_layer(random_weight(name, out_features, in_features, group_size), isa)


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
