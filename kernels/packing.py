"""Packed layout v1: codes of 1, 2, 3, 4 or 8 bits in rows of bytes.

The codes of a row are cut in blocks of 128; the last block may be shorter. A block of P codes of b bits is
stored in L = ceil(P b / 16) lanes of 16 bits, little-endian:

    code k of the block  ->  lane k mod L, bits [b (k div L), b (k div L) + b)        b in {1, 2, 4, 8}

so consecutive lanes shifted by b p are L consecutive codes (the plane p), and two adjacent lanes are two
adjacent codes. A short block follows the same rule with its own L: nothing is padded to 128, only up to a
whole lane, with zeros. Three bits are stored as two parts, one after the other:

    row of 3-bit codes  =  row of the 2-bit codes (q & 3)  |  row of the 1-bit codes (q >> 2)

The layout is what a checkpoint stores: a change of it needs a new format version. What a code means is not
known here.
"""

import torch
from torch import Tensor
from torch.nn import functional

BITS = (1, 2, 3, 4, 8)
BLOCK_SIZE = 128


def row_bytes(in_features: int, bits: int) -> int:
    """Number of bytes that `in_features` codes of `bits` bits take.

    Raises:
        ValueError: the width is not one of `BITS`, or there is no code.
    """
    _check_width(in_features, bits)
    if bits == 3:
        return row_bytes(in_features, 2) + row_bytes(in_features, 1)
    n_blocks, n_left = divmod(in_features, BLOCK_SIZE)
    return 2 * (n_blocks * _n_lanes(BLOCK_SIZE, bits) + _n_lanes(n_left, bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into rows of bytes.

    Args:
        codes: (out_features, in_features) uint8, each below 2**bits.
        bits: width of a code.

    Returns:
        (out_features, row_bytes(in_features, bits)) uint8, on the device of `codes`.

    Raises:
        ValueError: a wrong shape, dtype or width, or a code that does not fit.
    """
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ValueError(
            f"codes must be (out_features, in_features) torch.uint8, got {tuple(codes.shape)} {codes.dtype}"
        )
    _check_width(codes.shape[1], bits)
    if codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise ValueError(f"codes of {bits} bits must be below {2**bits}, got {largest}")
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=1)
    n_whole = codes.shape[1] // BLOCK_SIZE * BLOCK_SIZE
    whole = codes[:, :n_whole].unflatten(1, (-1, BLOCK_SIZE))
    parts = [_pack_blocks(whole, bits).flatten(1)]
    if n_whole < codes.shape[1]:
        parts.append(_pack_blocks(codes[:, None, n_whole:], bits).flatten(1))
    return torch.cat(parts, dim=1)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Return the codes of packed rows.

    Args:
        packed: (out_features, row_bytes(in_features, bits)) uint8.
        bits: width of a code.
        in_features: number of codes in a row.

    Returns:
        (out_features, in_features) uint8, on the device of `packed`.

    Raises:
        ValueError: a wrong shape, dtype or width.
    """
    width = row_bytes(in_features, bits)
    if packed.ndim != 2 or packed.shape[1] != width or packed.dtype != torch.uint8:
        raise ValueError(
            f"packed rows of {in_features} codes of {bits} bits must be (out_features, {width}) torch.uint8, "
            f"got {tuple(packed.shape)} {packed.dtype}"
        )
    if bits == 3:
        low, high = packed.split([row_bytes(in_features, 2), row_bytes(in_features, 1)], dim=1)
        return unpack(low, 2, in_features) | (unpack(high, 1, in_features) << 2)
    n_blocks, n_left = divmod(in_features, BLOCK_SIZE)
    n_lanes = _n_lanes(BLOCK_SIZE, bits)
    whole = packed[:, : 2 * n_lanes * n_blocks].unflatten(1, (n_blocks, n_lanes, 2))
    codes = _unpack_blocks(whole, bits).flatten(1)
    if not n_left:
        return codes
    last = packed[:, None, 2 * n_lanes * n_blocks :].unflatten(2, (-1, 2))
    return torch.cat([codes, _unpack_blocks(last, bits)[:, 0, :n_left]], dim=1)


def _check_width(in_features: int, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"a code of {bits} bits cannot be packed; widths: {BITS}")
    if in_features < 1:
        raise ValueError(f"a packed row needs at least one code, got in_features {in_features}")


def _n_lanes(n_codes: int, bits: int) -> int:
    return -(-n_codes * bits // 16)


def _pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """Pack (rows, n_blocks, block) codes into (rows, n_blocks, n_lanes, 2) bytes."""
    n_lanes = _n_lanes(codes.shape[2], bits)
    n_slots = n_lanes * 16 // bits
    codes = functional.pad(codes, (0, n_slots - codes.shape[2]))
    # Planes 0 .. 8/bits - 1 fill the low byte of a lane, the others its high byte.
    planes = codes.unflatten(2, (2, 8 // bits, n_lanes)).unbind(3)
    halves = torch.zeros_like(planes[0])  # (rows, n_blocks, 2, n_lanes)
    for plane, shift in zip(planes, range(0, 8, bits), strict=True):
        halves |= plane << shift
    return halves.transpose(2, 3)


def _unpack_blocks(lanes: Tensor, bits: int) -> Tensor:
    """Unpack (rows, n_blocks, n_lanes, 2) bytes into (rows, n_blocks, n_slots) codes."""
    halves = lanes.transpose(2, 3).contiguous()  # (rows, n_blocks, 2, n_lanes)
    planes = [(halves >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(planes, dim=3).flatten(2)
