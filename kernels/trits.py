"""Ternary codes as they are stored: five trits a byte, 3^5 = 243.

In memory a byte of packed layout v1 (`vlmq.kernels.packing`) holds four trits: four codes of 2 bits below 3, or two
codes of 4 bits below 9, which are pairs of trits. 81 = 3^4 different bytes occur, in order b_0 < ... < b_80. Of a row
of n bytes the last n - m are spread over the first m = ceil(4 n / 5), one trit d_j to each:

    stored[j] = r + 81 d_j  for  packed[j] = b_r                                j = 0 .. m - 1
    packed[m + i] = b_r  for  r = sum_c 3^c d_(4 i + c),  c = 0 .. 3            i = 0 .. n - m - 1;  other d_j are 0

so both ways are a look-up and a few additions per byte, and which code stands where does not matter. The bytes 243 to
255 hold no trits; they are read as 255, whose codes no ternary format has. Rows of up to four bytes would gain nothing.

The layout is what a checkpoint stores: a change of it needs a new format version.
"""

import torch
from torch import Tensor

BITS = (2, 4)
N_TRITS = 3**5
N_RANKS = 3**4
NO_TRITS = 255
CHUNK_BYTES = 1 << 22


def stored_bytes(row_bytes: int) -> int:
    """Number of bytes that a packed row of `row_bytes` bytes of ternary codes takes in trits."""
    return -(-4 * row_bytes // 5)


def to_trits(packed: Tensor, bits: int) -> Tensor:
    """Store packed rows in trits.

    Args:
        packed: (out_features, row_bytes) uint8, each code below 3^(bits / 2).
        bits: width of a code, 2 or 4.

    Returns:
        (out_features, stored_bytes(row_bytes)) uint8, on the device of `packed`.

    Raises:
        ValueError: a code that is not ternary.
    """
    bytes_of_rank = _bytes_of_rank(bits, packed.device)
    ranks = torch.full((256,), NO_TRITS, dtype=torch.uint8, device=packed.device)
    ranks[bytes_of_rank.long()] = torch.arange(N_RANKS, dtype=torch.uint8, device=packed.device)
    powers = torch.tensor([1, 3, 9, 27], device=packed.device)
    digits = (torch.arange(N_RANKS, device=packed.device)[:, None] // powers % 3).to(torch.uint8)  # (81, 4)
    width = stored_bytes(packed.shape[1])
    n_spread = 4 * (packed.shape[1] - width)
    stored = packed.new_empty(packed.shape[0], width)
    for rows, part in zip(_row_chunks(stored), _row_chunks(packed, stored), strict=True):
        found = _look_up(ranks, part)
        if found.numel() and int(found.max()) == NO_TRITS:
            raise ValueError(
                f"codes of {bits} bits must be below {3 ** (bits // 2)} to be stored in trits, got others"
            )
        rows.copy_(found[:, :width])
        rows[:, :n_spread] += N_RANKS * _look_up(digits, found[:, width:]).flatten(1)
    return stored


def from_trits(stored: Tensor, bits: int, row_bytes: int) -> Tensor:
    """Return the packed rows; for each byte above 242 one of 255.

    Args:
        stored: (out_features, stored_bytes(row_bytes)) uint8.
        bits: width of a code, 2 or 4.
        row_bytes: bytes of a packed row.

    Returns:
        (out_features, row_bytes) uint8, on the device of `stored`. Beside it and `stored`, a few times CHUNK_BYTES
        are held.
    """
    bytes_of_rank = _bytes_of_rank(bits, stored.device)
    values = torch.arange(256, device=stored.device)
    first = bytes_of_rank[values % N_RANKS].masked_fill(values >= N_TRITS, NO_TRITS)
    spread = (values // N_RANKS % 3).to(torch.uint8)
    width = stored.shape[1]
    n_spread = 4 * (row_bytes - width)
    powers = torch.tensor([1, 3, 9, 27], dtype=torch.uint8, device=stored.device)
    packed = stored.new_empty(stored.shape[0], row_bytes)
    for rows, part in zip(_row_chunks(packed, stored), _row_chunks(stored), strict=True):
        rows[:, :width] = _look_up(first, part)
        digits = _look_up(spread, part[:, :n_spread]).unflatten(1, (-1, 4))
        rows[:, width:] = _look_up(bytes_of_rank, (digits * powers).sum(2, dtype=torch.uint8))
    return packed


def _row_chunks(tensor: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """The rows in views of about CHUNK_BYTES; as many rows in each as those of `like` have."""
    return tensor.split(max(1, CHUNK_BYTES // (tensor if like is None else like).shape[1]))


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices] for indices of uint8, which torch would take for a mask."""
    return table.index_select(0, indices.flatten().int()).view(*indices.shape, *table.shape[1:])


def _bytes_of_rank(bits: int, device: torch.device) -> Tensor:
    """The bytes whose codes are all ternary, in order, (81,) uint8."""
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits are not stored in trits; widths: {BITS}")
    values = torch.arange(256, device=device)
    codes = torch.stack([(values >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])
    return values[(codes < 3 ** (bits // 2)).all(0)].to(torch.uint8)
