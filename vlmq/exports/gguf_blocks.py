"""The block types of GGUF that hold whole numbers with one scale, and what they can say of a packed layer.

    W[o, i] = d[o, i // n] v[o, i]        v in [low, high], d float16, n weights in a block

A layer fits a type if its weights are whole numbers in that range (`vlmq.exports.grid`; zero points that stand on
levels are subtracted), if no block crosses a group, and if its width is a multiple of n. Then nothing is rounded.
Changing the sign of d and v reaches the ranges from the other side: -2..1 is -1..2.

    type   bits    n    v         bytes of a block
    Q1_0   1.125   128  -1, 1     d, bits, lowest first
    TQ1_0  1.6875  256  -1..1     five trits a byte, d
    TQ2_0  2.0625  256  -1..1     two-bit codes, d
    Q2_0   2.25    64   -1..2     d, two-bit codes, lowest first
    Q2_K   2.625   256  -2..1     16 scales and minima of 4 bits, codes, d, d of the minima
    Q3_K   3.4375  256  -4..3     high bits, codes, 16 scales of 6 bits, d
    Q4_0   4.5     32   -8..7     d, four-bit codes
    Q5_0   5.5     32   -16..15   d, high bits, four-bit codes
    Q8_0   8.5     32   -128..127 d, bytes

Q2_K and Q3_K have a whole-numbered scale for each 16 weights beside d; it is 1 here, as the float16 scales of smaller
groups are no multiples of one another. Q4_1 adds a float16 offset to each block of 32: `with_offsets` keeps codes and
scales of a layer with zero points and rounds only -s z, which is what changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.exports.grid import ShapeError, integer_grid
from vlmq.formats import QuantizedWeight, expand_groups

TRITS = (81, 27, 9, 3, 1)


@dataclass(frozen=True)
class BlockType:
    """One block type.

    Attributes:
        name: as llama.cpp calls it.
        number: by which a file names it.
        n_weights: in a block.
        n_bytes: of a block.
        levels: what v can be.
        pack: from v, (n_blocks, n_weights) uint8 counted from the lowest level, and d, (n_blocks, 2) bytes, to blocks.
    """

    name: str
    number: int
    n_weights: int
    n_bytes: int
    levels: Sequence[int]
    pack: Callable[[Tensor, Tensor], Tensor]

    @property
    def bits_per_weight(self) -> float:
        """With the scale."""
        return 8 * self.n_bytes / self.n_weights


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks: `data` is (out_features, bytes of a row) uint8."""

    type: BlockType
    data: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        n_rows, n_bytes = self.data.shape
        return n_rows, n_bytes // self.type.n_bytes * self.type.n_weights


def _fields(codes: Tensor, bits: int, stride: int) -> Tensor:
    """Pack codes (n_blocks, n) so that those `stride` apart share a byte, the first in the lowest bits."""
    n_fields = 8 // bits
    parts = codes.unflatten(1, (-1, n_fields, stride)).int()
    shifts = torch.arange(0, 8, bits).view(1, 1, n_fields, 1)
    return (parts << shifts).sum(2).flatten(1).to(torch.uint8)


def _trits(codes: Tensor, n_bytes: int) -> Tensor:
    """Pack the digits of each byte as the fraction of 256 that they are of 243, rounded up."""
    digits = codes.view(len(codes), -1, n_bytes).int()
    powers = torch.tensor(TRITS[: digits.shape[1]]).view(1, -1, 1)
    return (((digits * powers).sum(1) * 256 + 242) // 243).to(torch.uint8)


def _constant(codes: Tensor, values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).expand(len(codes), -1)


def _q1_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([d, _fields(codes >> 1, 1, 1)], 1)


def _tq1_0(codes: Tensor, d: Tensor) -> Tensor:
    parts = (_trits(codes[:, :160], 32), _trits(codes[:, 160:240], 16), _trits(codes[:, 240:], 4))
    return torch.cat([*parts, d], 1)


def _tq2_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([_fields(codes, 2, 32), d], 1)


def _q2_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([d, _fields(codes, 2, 1)], 1)


def _q2_k(codes: Tensor, d: Tensor) -> Tensor:
    one_and_two = _constant(codes, [1 | 2 << 4] * 16)
    return torch.cat([one_and_two, _fields(codes, 2, 32), d, d], 1)


def _q3_k(codes: Tensor, d: Tensor) -> Tensor:
    ones = _constant(codes, [1 | 1 << 4] * 8 + [0b10101010] * 4)
    return torch.cat([_fields(codes >> 2, 1, 32), _fields(codes & 3, 2, 32), ones, d], 1)


def _q4_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([d, _fields(codes, 4, 16)], 1)


def _q5_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([d, _fields(codes >> 4, 1, 1), _fields(codes & 15, 4, 16)], 1)


def _q8_0(codes: Tensor, d: Tensor) -> Tensor:
    return torch.cat([d, codes ^ 128], 1)


TYPES: dict[str, BlockType] = {
    t.name: t
    for t in (
        BlockType("Q1_0", 41, 128, 18, (-1, 1), _q1_0),
        BlockType("TQ1_0", 34, 256, 54, range(-1, 2), _tq1_0),
        BlockType("TQ2_0", 35, 256, 66, range(-1, 2), _tq2_0),
        BlockType("Q2_0", 42, 64, 18, range(-1, 3), _q2_0),
        BlockType("Q2_K", 10, 256, 84, range(-2, 2), _q2_k),
        BlockType("Q3_K", 11, 256, 110, range(-4, 4), _q3_k),
        BlockType("Q4_0", 2, 32, 18, range(-8, 8), _q4_0),
        BlockType("Q5_0", 6, 32, 22, range(-16, 16), _q5_0),
        BlockType("Q8_0", 8, 32, 34, range(-128, 128), _q8_0),
    )
}
Q4_1 = BlockType("Q4_1", 3, 32, 20, range(16), _q4_0)
COMMON = ("TQ2_0", "Q2_K", "Q3_K", "Q4_0", "Q5_0", "Q8_0")
SMALLEST = ("Q1_0", "TQ1_0", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q5_0", "Q8_0")


def to_blocks(weight: QuantizedWeight, types: Sequence[str]) -> Blocks:
    """Write a weight in the first of those types that can say it exactly.

    Raises:
        ValueError: none can; the message says why, without the layer's name.
    """
    width = weight.codes.shape[1]
    _check_width(width)
    grid = integer_grid(weight)
    values = grid.values
    if grid.zeros is not None:
        values = values - expand_groups(grid.zeros, grid.group_size, width)
    used = (torch.bincount((values.flatten() + 512).int()).nonzero()[:, 0] - 512).tolist()
    for name in types:
        type_ = TYPES[name]
        sign = next((s for s in (1, -1) if all(s * v in type_.levels for v in used)), None)
        if sign is not None and not _why_no_blocks(width, grid.group_size, type_.n_weights):
            codes = (sign * values - type_.levels[0]).to(torch.uint8)
            return Blocks(type_, _pack(type_, codes, grid.scales * sign, grid.group_size))
    reason = _why_no_blocks(width, grid.group_size, 32)
    raise ValueError(reason or f"its weights span {used[0]} to {used[-1]} steps, a block -128 to 127")


def with_offsets(weight: QuantizedWeight) -> tuple[Blocks, Tensor]:
    """Write a weight as Q4_1, where only -s z is rounded, to float16.

    Returns:
        the blocks, and the weights that they hold, (out_features, in_features) float32.

    Raises:
        ValueError: the weight has more than one plane, more than 16 levels, or no such blocks.
    """
    fmt, width = weight.format, weight.codes.shape[1]
    if fmt.n_terms > 1 or fmt.n_levels > 16:
        raise ValueError(f"Q4_1 takes one plane of at most 16 levels, {fmt.name} has {fmt.n_levels} codes")
    _check_width(width)
    if reason := _why_no_blocks(width, weight.group_size, 32):
        raise ValueError(reason)
    first = fmt.levels[0][0]
    step = fmt.levels[1][0] - first
    zeros = 0.0 if weight.zeros is None else weight.zeros.float() * fmt.zero_step
    scales = weight.scales[..., 0].float()
    offsets = (scales * (first - zeros)).half()
    d = (scales * step).half()
    if not bool(torch.isfinite(torch.cat([d, offsets], 1)).all()):
        raise ValueError("its scale or offset is beyond the range of float16")
    blocks = _pack(Q4_1, weight.codes, d, weight.group_size, offsets)
    values = weight.codes.float() * expand_groups(d, weight.group_size, width).float()
    return Blocks(Q4_1, blocks), values + expand_groups(offsets, weight.group_size, width).float()


def _pack(
    type_: BlockType, codes: Tensor, scales: Tensor, group_size: int | None, offsets: Tensor | None = None
) -> Tensor:
    """Blocks of a matrix; scales and offsets are (out_features, n_groups) float16."""
    n_rows, width = codes.shape
    places = torch.arange(0, width, type_.n_weights) // (group_size or width)
    heads = [scales[:, places]] if offsets is None else [scales[:, places], offsets[:, places]]
    head = torch.stack(heads, -1).view(torch.uint8).flatten(0, 1)  # (n_blocks, 2 or 4)
    return type_.pack(codes.view(-1, type_.n_weights), head).view(n_rows, -1)


def _check_width(width: int) -> None:
    if reason := _why_no_blocks(width, None, 32):
        raise ShapeError(reason)


def _why_no_blocks(width: int, group_size: int | None, n_weights: int) -> str | None:
    """Why blocks of that many weights do not fit a matrix, None if they do."""
    if width % n_weights:
        return f"it has {width} inputs, which are no blocks of {n_weights}"
    if group_size is not None and width > group_size and group_size % n_weights:
        return f"its groups of {group_size} are no whole blocks of {n_weights}, which have one scale"
    return None
