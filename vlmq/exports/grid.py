"""A quantized weight as whole numbers with one scale a group: what most other formats can say.

    W[o, i] = s[o, g(i)] (v[o, i] - z[o, g(i)])        v, z in [-2^(bits-1), 2^(bits-1))

vlmq's own formula is wider: levels of any spacing, zero points between two levels, two planes with a scale each. A
weight fits here if its levels are whole numbers, if it has one plane, and if every zero point stands on a level.
Then nothing is rounded: v, z and s are what the checkpoint stores, only counted from another origin. More bits or
smaller groups say the same values, which is how layers that a target fuses come to share one scheme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmq.formats import QuantizedWeight, expand_groups, n_groups


class ShapeError(ValueError):
    """The target has no room for the sizes of a layer, whatever numbers it holds: rounding does not help."""


@dataclass(frozen=True)
class IntegerGrid:
    """A weight of (out_features, in_features) on a grid of whole numbers.

    Attributes:
        values: (out_features, in_features) int16.
        scales: (out_features, n_groups) float16.
        zeros: (out_features, n_groups) int16, None if all are zero.
        bits: width that holds values and zeros, two's complement.
        group_size: weights per group, None for one group per channel.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int | None

    def dequantize(self) -> Tensor:
        """Return the weights, (out_features, in_features) float32."""
        width = self.values.shape[1]
        values = self.values.float()
        if self.zeros is not None:
            values = values - expand_groups(self.zeros, self.group_size, width).float()
        return values * expand_groups(self.scales, self.group_size, width).float()


def integer_grid(weight: QuantizedWeight) -> IntegerGrid:
    """Write a weight on a grid of whole numbers, exactly.

    Raises:
        ValueError: the weight is not on one; the message says why, without the layer's name.
    """
    fmt = weight.format
    if fmt.n_terms > 1:
        raise ValueError(f"{fmt.name} adds planes with a scale each, there is room for one scale only")
    levels = torch.tensor(fmt.levels, device=weight.codes.device)[:, 0].to(torch.int16)
    values = levels[weight.codes.long()]
    scales = weight.scales[..., 0]
    if weight.zeros is None:
        bits = max(2, int(levels.max()).bit_length() + 1, int(levels.min() + 1).bit_length() + 1)
        return IntegerGrid(values, scales, None, bits, weight.group_size)
    step = round(1 / fmt.zero_step)
    if n_between := int((weight.zeros % step != 0).sum()):
        raise ValueError(
            f"{n_between} of {weight.zeros.numel()} zero points of {fmt.name} stand between two whole numbers"
        )
    origin = 2 ** (fmt.bits - 1)
    zeros = (weight.zeros // step).to(torch.int16) - origin
    has_zeros = bool((zeros != 0).any())
    return IntegerGrid(
        values - origin, scales, zeros if has_zeros else None, max(2, fmt.bits), weight.group_size
    )


def wide_grid(weight: QuantizedWeight) -> IntegerGrid:
    """The same on 4 or 8 bits, for engines that have kernels for these only.

    Raises:
        ValueError: as `integer_grid`.
    """
    grid = integer_grid(weight)
    return replace(grid, bits=4 if grid.bits <= 4 else 8)


def regroup(grid: IntegerGrid, group_size: int | None) -> IntegerGrid:
    """The same weight in smaller groups, of a size that divides the old one (or the width, for whole channels)."""
    if group_size == grid.group_size:
        return grid
    width = grid.values.shape[1]
    assert group_size is not None
    assert (grid.group_size or width) % group_size == 0
    places = torch.arange(n_groups(width, group_size)) * group_size // (grid.group_size or width)
    zeros = None if grid.zeros is None else grid.zeros[:, places]
    return replace(grid, scales=grid.scales[:, places], zeros=zeros, group_size=group_size)


def whole_groups(grid: IntegerGrid) -> IntegerGrid:
    """The same weight in groups that all have the same number of weights; a single group becomes a channel."""
    width, size = grid.values.shape[1], grid.group_size
    if size is None or width <= size:
        return replace(grid, group_size=None)
    return regroup(grid, math.gcd(width, size))


def share(grids: Sequence[IntegerGrid]) -> list[IntegerGrid]:
    """The same weights with the same bits, group size and kind of zero points, for a target that fuses the layers."""
    sizes = {grid.group_size for grid in grids}
    if len(sizes) > 1:
        common = math.gcd(*(grid.group_size or grid.values.shape[1] for grid in grids))
        grids = [regroup(grid, common) for grid in grids]
    bits = max(grid.bits for grid in grids)
    if any(grid.zeros is not None for grid in grids):
        none = [grid.zeros is None for grid in grids]
        grids = [
            replace(grid, zeros=torch.zeros_like(grid.scales, dtype=torch.int16)) if without else grid
            for grid, without in zip(grids, none, strict=True)
        ]
    return [replace(grid, bits=bits) for grid in grids]
