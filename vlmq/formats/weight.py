"""A quantized matrix in its stored numbers: codes, scales, zero points.

Scales are float16 and zero points bytes from the moment they are fitted, so a solver sees exactly the
values that a checkpoint stores, and saving loses nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.formats.format import GROUP_SIZES, Format

SLICE_VALUES = 2**18
SLICE_ROWS = 64


def n_groups(in_features: int, group_size: int | None) -> int:
    """Number of groups in a row of `in_features` weights; the last one may be shorter."""
    return 1 if group_size is None else -(-in_features // group_size)


def expand_groups(values: Tensor, group_size: int | None, in_features: int) -> Tensor:
    """Repeat per-group values along the inputs.

    Args:
        values: (out_features, n_groups, ...) of any dtype.
        group_size: weights per group, None for one group per channel.
        in_features: number of weights in a row.

    Returns:
        (out_features, in_features, ...), the same dtype.
    """
    size = in_features if group_size is None else group_size
    return values.repeat_interleave(size, dim=1)[:, :in_features]


def row_slices(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, of about SLICE_VALUES values, so that what goes row by row takes little memory.

    All but the last are multiples of SLICE_ROWS, and the last is no shorter than the others: vector instructions end
    at the same rows as without slices, and no product becomes one of a few rows, so the bits are the same.
    """
    size = SLICE_ROWS * max(1, SLICE_VALUES // (n_columns * SLICE_ROWS))
    starts = range(0, max(1, n_rows - size + 1), size)
    return (slice(start, start + size if start + 2 * size <= n_rows else n_rows) for start in starts)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix of (out_features, in_features) on its grid.

    `codes`: (out_features, in_features) uint8. `scales`: (out_features, n_groups, n_terms) float16.
    `zeros`: (out_features, n_groups) uint8 in fixed point, None for formats without a zero point.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: Format
    group_size: int | None

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: a shape, a dtype or the group size does not fit the format.
        """
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size} is not offered; offered: {GROUP_SIZES}")
        out_features, in_features = self.codes.shape
        groups = (out_features, n_groups(in_features, self.group_size))
        expected = [("codes", self.codes, torch.uint8, (out_features, in_features))]
        expected.append(("scales", self.scales, torch.float16, (*groups, self.format.n_terms)))
        if self.format.has_zero != (self.zeros is not None):
            raise ValueError(
                f"format {self.format.name} {'needs' if self.format.has_zero else 'has no'} zeros"
            )
        if self.zeros is not None:
            expected.append(("zeros", self.zeros, torch.uint8, groups))
        for name, tensor, dtype, shape in expected:
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                got = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name} of a {self.format.name} weight must be {shape} {dtype}, got {got}")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights, (out_features, in_features) in `dtype`, computed in float32."""
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        levels = torch.tensor(self.format.levels, dtype=torch.float32, device=self.codes.device)
        for rows in row_slices(*self.codes.shape):
            weight[rows] = self._dequantize_rows(rows, levels)
        return weight

    def _dequantize_rows(self, rows: slice, levels: Tensor) -> Tensor:
        in_features = self.codes.shape[1]
        values = levels[self.codes[rows].long()]  # (n_rows, in_features, n_terms)
        if self.zeros is not None:
            zeros = (
                expand_groups(self.zeros[rows], self.group_size, in_features).float() * self.format.zero_step
            )
            values = values - zeros[..., None]
        scales = expand_groups(self.scales[rows], self.group_size, in_features).float()
        return (values * scales).sum(-1)
