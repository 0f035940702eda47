"""The dequantized weight in a workspace, bit for bit the reference's, for the vendor's matrix product.

One pass that reads packed codes and writes W in the dtype of x: above some hundred tokens the product itself costs so
much more that a plain GEMM behind it is faster than unpacking once per tile of tokens.
"""

import triton
import triton.language as tl

from vlmq.kernels.triton_unpack import codes_per_plane, gather_codes, weights_of


def dequantize_rows(in_features: int, group_size: int, bits: int) -> int:
    """Rows of a tile: as many as leave fewer groups than a program has threads.

    Of so few scales each thread loads those of its own codes; more would take a way through shared memory. Where the
    last block of a row is shorter, its loads of single codes take too many registers for more than 16, and codes of
    three bits, which are two loads each, for more than 32.
    """
    if in_features % 128:
        return 16
    return min(32 if bits == 3 else 64, 64 if group_size in (0, 128) else max(16, group_size // 2))


@triton.jit
def dequantize_kernel(
    p_weight,
    p_scales,
    p_zeros,
    p_out,
    N,
    K,
    row_units,
    high_units,
    UNIT: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_UNIT: tl.constexpr,
):
    """Dequantize BLOCK_N rows of one block of 128 codes; the last block may be shorter.

    Args:
        p_weight: (N, row_units * UNIT) uint16 lanes. p_scales: (N, groups, terms) float16. p_zeros: (N, groups) uint8
            or None.
        p_out: (N, K) float32, bfloat16 or float16.
        row_units: lanes of a row, in UNIT, which tells the compiler what the rows are aligned to.
        high_units: lanes before the part of the third bit of 3-bit codes, in UNIT.
        FORMAT: (bits, terms, first level, step of the levels).
        GROUP: group size, 0 for one group per channel.
        K_UNIT: `row_unit` of K, which tells the compiler what the rows of `p_out` are aligned to.

    Grid: (tiles of rows * blocks of a row,), the blocks of a tile after one another; the other axes of a grid hold
    65535 programs only, fewer than a matrix may have tiles.
    """
    BITS: tl.constexpr = FORMAT[0]
    TERMS: tl.constexpr = FORMAT[1]
    LANES: tl.constexpr = codes_per_plane(BITS)
    CODES: tl.constexpr = GROUP if GROUP else 128
    TAIL: tl.constexpr = K_UNIT < 128
    if K_UNIT < 16:
        K = K // K_UNIT * K_UNIT
    n_blocks = tl.cdiv(K, 128)
    block = tl.program_id(0) % n_blocks
    o_n = tl.program_id(0) // n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(o_n, N - 1).to(tl.int64)[:, None, None]
    n_left = K - block * 128
    # Groups are an axis of their own, so that a thread loads the scale of its codes once.
    first = (tl.arange(0, 128 // CODES) * CODES)[None, :, None]
    k = first + tl.arange(0, CODES)[None, None, :]
    p_row = p_weight + row * (row_units * UNIT)
    o_lanes = block * LANES
    o_high = high_units * UNIT + block * 8
    # [BLOCK_N, 128 / CODES, CODES]
    if not TAIL or n_left >= 128:
        q = gather_codes(p_row, k, LANES, 8, o_lanes, o_high, BITS)
    else:
        q = gather_codes(p_row, k, (n_left * LANES + 127) // 128, (n_left + 15) // 16, o_lanes, o_high, BITS)
    n_groups = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    group = first * 0 if GROUP == 0 else tl.minimum(block * 128 + first, K - 1) // GROUP
    # [BLOCK_N, 128 / CODES, 1]
    p_s = p_scales + (row * n_groups + group) * TERMS
    p_z = None if p_zeros is None else p_zeros + row * n_groups + group
    w = weights_of(q, p_s, p_z, BITS, TERMS, FORMAT[2], FORMAT[3])
    m_out = (o_n < N)[:, None, None]
    if TAIL:
        m_out = m_out & (k < n_left)
    tl.store(p_out + row * K + block * 128 + k, w.to(p_out.dtype.element_ty), mask=m_out)
