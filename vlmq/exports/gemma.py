"""Export to transformers' "gemma" quantization: packed layers of any model that load without a further package.

    W[o, i] = weight_scale[o] v[o, i]        v in [-2^(b-1), 2^(b-1)), b of 2, 4, 8

    weight                   (out_features, ceil(in_features b / 8)) uint8, v + 2^(b-1), low bits first; int8 for b = 8
    weight_scale             (out_features, 1) float32
    input_activation_scale,  () float32, 0: no rounding of activations. A file without them loads as garbage
    output_activation_scale

Despite its name transformers 5.23 takes it for any model; it is the one format of transformers' own that says ternary
and two-bit weights and leaves inputs alone. One scale per channel, no zero points, one plane.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmq.exports.grid import IntegerGrid, integer_grid, whole_groups
from vlmq.formats import QuantizedWeight

WIDTHS = (2, 4, 8)


def channel_grid(weight: QuantizedWeight) -> IntegerGrid:
    """Write a weight with one scale per channel and no zero points.

    Raises:
        ValueError: it has more; the message says what.
    """
    grid = whole_groups(integer_grid(weight))
    if grid.zeros is not None:
        raise ValueError("it has zero points, the format has none")
    if grid.group_size is not None:
        raise ValueError(f"it has groups of {grid.group_size}, the format has one scale per channel")
    return grid


def width_of(grid: IntegerGrid) -> int:
    """Bits that a layer is written with."""
    return next(bits for bits in WIDTHS if bits >= grid.bits)


def write_layer(grid: IntegerGrid) -> dict[str, Tensor]:
    """The tensors of one layer."""
    bits = width_of(grid)
    zero = torch.zeros((), dtype=torch.float32)
    return {
        "weight": grid.values.to(torch.int8) if bits == 8 else _pack(grid.values + 2 ** (bits - 1), bits),
        "weight_scale": grid.scales.float(),
        "input_activation_scale": zero,
        "output_activation_scale": zero.clone(),
    }


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (out_features, in_features) as bytes, the last one of a row filled up with zeros."""
    per_byte = 8 // bits
    parts = pad(codes.int(), (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    return (parts << torch.arange(0, 8, bits)).sum(2).to(torch.uint8)


def config_block(grids: Mapping[str, IntegerGrid], kept: list[str]) -> dict[str, Any]:
    """The `quantization_config`.

    Args:
        grids: the layers, by their names in memory.
        kept: linear layers in full precision.
    """
    widths = {name: width_of(grid) for name, grid in grids.items()}
    common = Counter(widths.values()).most_common(1)[0][0]
    others = {f"^{re.escape(n)}$": {"num_bits": bits} for n, bits in widths.items() if bits != common}
    return {
        "quant_method": "gemma",
        "num_bits": common,
        "quantize_embeddings": False,
        "module_quant_configs": others,
        "modules_to_not_convert": [f"{re.escape(name)}$" for name in kept],
    }
