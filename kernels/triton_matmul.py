"""y = x W^T of packed weights on a GPU, in one pass over them: the codes go from their lanes into tensor cores.

One program computes (BLOCK_N outputs, BLOCK_M tokens) over its share of the blocks of 128 codes. The weight is
the left operand, so that it stays in registers, and x transposed is the right one; one product per plane of the
lanes (`vlmq.kernels.packing`), which are consecutive codes, so x is read in order:

    t[o, n] = sum_{k in group} (q[o, k] - z[o, g]) x[n, k]          tensor cores, exact products, float32 sums
    acc[o, n] += s[o, g] t[o, n]                                    float32; once at the end if per channel

Weights are never rounded, except in the block at the end of a row that is shorter than 128: there W is computed as
the reference does and rounded to the dtype of x.

With few tokens one output tile cannot fill a GPU, so K is split over programs: each writes its float32 partial sums,
the first with the bias, and `reduce_kernel` adds them in order. No atomics: the same input gives the same bits.

Layers that read the same x are computed in one launch: the tiles of the second come after those of the first.
"""

import triton
import triton.language as tl

from vlmq.kernels.triton_layers import layer_of, one_of, total_of
from vlmq.kernels.triton_unpack import (
    codes_per_plane,
    digit,
    field,
    gather_codes,
    second_eight,
    unscale,
    weights_of,
    zero_addend,
)


@triton.constexpr_function
def codes_per_step(bits, blocks):
    """Consecutive codes of one block that one product takes; 128 / codes_per_step products take it all.

    A plane of 1-bit codes has only 8 lanes, and a product needs 16 columns. With two blocks and more they come from
    neighbouring blocks; else each lane is read twice, the second time for the plane after, 16 consecutive codes.
    """
    return {1: 16 if blocks == 1 else 8, 2: 16, 3: 16, 4: 32, 8: 64}[bits]


@triton.constexpr_function
def columns(bits, group, blocks):
    """Columns of the left operand of one product; all its codes of a block are in one group."""
    codes = codes_per_step(bits, blocks)
    return min(codes, group) if group else codes * blocks


@triton.jit
def _load_lanes(p, m):
    if m is None:
        lanes = tl.load(p, eviction_policy="evict_first")
    else:
        lanes = tl.load(p, mask=m, other=0, eviction_policy="evict_first")
    return lanes


@triton.jit
def _load_group(p_s, p_z, g, TERMS: tl.constexpr):
    """Stored scales and zero points of group `g`: (BLOCK_N,) each; what a format does not have repeats the scale."""
    s = tl.load(p_s + g * TERMS)
    s1 = s
    z = s
    if TERMS == 2:
        s1 = tl.load(p_s + g * TERMS + 1)
    if p_z is not None:
        z = tl.load(p_z + g)
    return s, s1, z


@triton.jit
def _factors(
    stored, HAS_ZERO: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr
):
    """Float32 factors of the two sums (BLOCK_N, 1), and what is added to codes for the zero point (if any)."""
    SCALE: tl.constexpr = FORMAT[3] * unscale(DTYPE, FORMAT[0])
    s = stored[0].to(tl.float32)[:, None] * SCALE
    s1 = stored[1].to(tl.float32)[:, None] * SCALE
    addend = s
    if HAS_ZERO:
        addend = zero_addend(stored[2][:, None], FORMAT[0], DTYPE, COMPUTE)
    return s, s1, addend


@triton.jit
def _products(
    acc,
    t0,
    t1,
    stored,
    second,
    p_x,
    m_x,
    p_w,
    p_high,
    m_w,
    p_s,
    p_z,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the products of BLOCKS blocks; returns (acc, t0, t1).

    Groups end in acc; per channel, the sums t0 and t1 of the two terms go on growing instead. `stored` are the scales
    and zero points of the block where it is one group or less, `second` is that of `field`. p_x: (columns, BLOCK_M),
    p_w and p_high: (BLOCK_N, columns), p_s and p_z: (BLOCK_N,) at the first group of the block.
    """
    BITS: tl.constexpr = FORMAT[0]
    TERMS: tl.constexpr = FORMAT[1]
    HAS_ZERO: tl.constexpr = p_z is not None
    CENTRE: tl.constexpr = None if HAS_ZERO else -FORMAT[2] / FORMAT[3]
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    CODES: tl.constexpr = codes_per_step(BITS, BLOCKS)
    COLUMNS: tl.constexpr = columns(BITS, GROUP, BLOCKS)
    TWICE: tl.constexpr = BITS == 1 and BLOCKS == 1
    tl.static_assert(COLUMNS >= 16)
    factors = _factors(stored, HAS_ZERO, FORMAT, DTYPE, COMPUTE)
    for part in tl.static_range(BLOCKS * CODES // COLUMNS):
        # [BLOCK_N, COLUMNS]
        w = _load_lanes(p_w + part * COLUMNS, m_w)
        high = w
        if BITS == 3:
            high = _load_lanes(p_high, m_w)
        for plane in tl.static_range(128 // CODES):
            if GROUP != 0 and (plane * CODES + part * COLUMNS) % GROUP == 0:
                t0 = tl.zeros_like(acc)
                t1 = tl.zeros_like(acc)
                if GROUP < 128:
                    group = _load_group(p_s, p_z, (plane * CODES + part * COLUMNS) // GROUP, TERMS)
                    factors = _factors(group, HAS_ZERO, FORMAT, DTYPE, COMPUTE)
            # [COLUMNS, BLOCK_M]
            x = tl.load(p_x + plane * CODES + part * COLUMNS, mask=m_x, other=0.0).to(COMPUTE)
            # [BLOCK_N, COLUMNS] @ [COLUMNS, BLOCK_M] -> [BLOCK_N, BLOCK_M]
            if TERMS == 2:
                t0 = tl.dot(digit(w, 0, plane * CODES // 8, BITS, DTYPE, COMPUTE, ASM), x, t0)
                t1 = tl.dot(digit(w, 1, plane * CODES // 8, BITS, DTYPE, COMPUTE, ASM), x, t1)
            else:
                a = field(
                    w, high, second, factors[2], plane * CODES // 8, BITS, CENTRE, TWICE, DTYPE, COMPUTE, ASM
                )
                t0 = tl.dot(a, x, t0)
            if GROUP != 0 and (plane * CODES + part * COLUMNS + COLUMNS) % GROUP == 0:
                acc += t0 * factors[0]
                if TERMS == 2:
                    acc += t1 * factors[1]
    return acc, t0, t1


@triton.jit
def _whole_block_products(
    acc,
    p_x,
    m_x,
    p_weight,
    p_w,
    p_s,
    p_z,
    K,
    high_lanes,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the products of this split's blocks of 128 codes.

    p_x: (1, BLOCK_M) rows of x, p_w: (BLOCK_N, 1) packed rows of p_weight, p_s and p_z: (BLOCK_N,) rows of scales and
    of zero points.
    """
    BITS: tl.constexpr = FORMAT[0]
    TERMS: tl.constexpr = FORMAT[1]
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    CODES: tl.constexpr = codes_per_step(BITS, BLOCKS)
    COLUMNS: tl.constexpr = columns(BITS, GROUP, BLOCKS)
    LANES: tl.constexpr = codes_per_plane(BITS)
    n_blocks = K // 128
    share = tl.cdiv(tl.cdiv(n_blocks, BLOCKS), tl.num_programs(2)) * BLOCKS
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, n_blocks)
    o_column = tl.arange(0, COLUMNS)
    twice = (o_column // 16 * 8 + o_column % 8)[None, :]
    p_x_tile = p_x + (o_column // CODES * 128 + o_column % CODES)[:, None]
    p_high = p_w + high_lanes + twice
    p_low = p_w + (twice if BITS == 1 and BLOCKS == 1 else o_column[None, :])

    second = second_eight(p_weight, K, COLUMNS)
    t0 = tl.zeros_like(acc)
    t1 = tl.zeros_like(acc)
    PER_BLOCK: tl.constexpr = 0 if GROUP == 0 else 128 // GROUP
    stored = _load_group(p_s, p_z, tl.minimum(first, tl.maximum(n_blocks - 1, 0)) * PER_BLOCK, TERMS)
    for block in range(first, last, BLOCKS):
        ahead = stored
        if GROUP == 128:
            # One block ahead: tensor cores need not wait for the scale.
            ahead = _load_group(p_s, p_z, tl.minimum(block + 1, last - 1), TERMS)
        m_w = None
        m_x_tile = m_x
        if BLOCKS > 1:
            m_block = (block + o_column // CODES) < n_blocks
            m_w = m_block[None, :]
            m_x_tile = m_x & m_block[:, None]
        acc, t0, t1 = _products(
            acc,
            t0,
            t1,
            stored,
            second,
            p_x_tile + block * 128,
            m_x_tile,
            p_low + block * LANES,
            p_high + block * 8,
            m_w,
            p_s + block * PER_BLOCK * TERMS,
            None if p_z is None else p_z + block * PER_BLOCK,
            FORMAT,
            GROUP,
            BLOCKS,
            COMPUTE,
            ASM,
        )
        stored = ahead
    if GROUP == 0:
        factors = _factors(stored, False, FORMAT, DTYPE, COMPUTE)
        acc = t0 * factors[0]
        if TERMS == 2:
            acc += t1 * factors[1]
    return acc


@triton.jit
def _tail_products(
    acc,
    p_x,
    m_x,
    p_w,
    p_s,
    p_z,
    K,
    high_lanes,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    COMPUTE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add the products of the last block, shorter than 128: p_x (1, BLOCK_M) rows, p_w, p_s, p_z (BLOCK_N, 1) rows."""
    BITS: tl.constexpr = FORMAT[0]
    LANES: tl.constexpr = codes_per_plane(BITS)
    start = K // 128 * 128
    n_lanes = ((K - start) * LANES + 127) // 128
    n_lanes_high = (K - start + 15) // 16
    o_lanes = start // 128 * LANES
    for k in range(0, K - start, STEP):
        o_k = k + tl.arange(0, STEP)
        group = 0 if GROUP == 0 else tl.minimum(start + o_k, K - 1)[None, :] // GROUP
        p_zeros = None if p_z is None else p_z + group
        o_high = high_lanes + start // 128 * 8
        q = gather_codes(p_w, o_k[None, :], n_lanes, n_lanes_high, o_lanes, o_high, BITS)
        w = weights_of(q, p_s + group * FORMAT[1], p_zeros, BITS, FORMAT[1], FORMAT[2], FORMAT[3])
        # [STEP, BLOCK_M]
        o_k = start + o_k[:, None]
        x = tl.load(p_x + o_k, mask=m_x & (o_k < K), other=0.0).to(COMPUTE)
        # [BLOCK_N, STEP] @ [STEP, BLOCK_M] -> [BLOCK_N, BLOCK_M]
        acc = tl.dot(w.to(p_x.dtype.element_ty).to(COMPUTE), x, acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    p_x,
    p_weight,
    p_scales,
    p_zeros,
    p_bias,
    p_y,
    M,
    N,
    K,
    row_units,
    high_units,
    UNIT: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    K_UNIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of y of one of the layers, or of one split's partial sums.

    Args:
        p_x: (M, K) float16 or bfloat16.
        p_weight, p_scales, p_zeros, p_bias, N: one entry for each layer. p_weight: (N, row_units * UNIT) uint16 lanes.
            p_scales: (N, groups, terms) float16. p_zeros: (N, groups) uint8, or None for all. p_bias: (N,), or None.
        p_y: (M, N) of each layer, one after the other, in the dtype of x; or (splits, those) float32.
        row_units: lanes of a row, in UNIT, which tells the compiler what the rows are aligned to.
        high_units: lanes before the part of the third bit of 3-bit codes, in UNIT.
        FORMAT: (bits, terms, first level, step of the levels).
        GROUP: group size, 0 for one group per channel.
        BLOCKS: blocks of 128 codes per iteration; 1 unless GROUP is 0.
        K_UNIT: `row_unit` of K, which tells the compiler what the rows of x are aligned to.
        COMPUTE: float32 for bfloat16 in the interpreter, else the dtype of x.
        ASM: inline assembly, not for the interpreter.

    Grid: (tiles of N of all layers, tiles of M, splits of K).
    """
    TERMS: tl.constexpr = FORMAT[1]
    if K_UNIT < 16:
        K = K // K_UNIT * K_UNIT
    tl.static_assert(BLOCKS == 1 or GROUP == 0)
    tl.static_assert(BLOCK_N >= 16 and BLOCK_M >= 8)
    i_m, i_s = tl.program_id(1), tl.program_id(2)
    layer, i_n, n_rows, n_before = layer_of(tl.program_id(0), N, BLOCK_N)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the last read the last one, and are not stored.
    row = tl.minimum(o_n, n_rows - 1).to(tl.int64)
    n_groups = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    p_lanes = one_of(p_weight, layer)
    p_s = one_of(p_scales, layer) + row * (n_groups * TERMS)
    p_z = None if p_zeros is None else one_of(p_zeros, layer) + row * n_groups
    p_row = p_lanes + row[:, None] * (row_units * UNIT)
    o_high = high_units * UNIT
    m_x = (o_m < M)[None, :]
    p_x_rows = p_x + o_m.to(tl.int64)[None, :] * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    acc = _whole_block_products(
        acc, p_x_rows, m_x, p_lanes, p_row, p_s, p_z, K, o_high, FORMAT, GROUP, BLOCKS, COMPUTE, ASM
    )
    if K_UNIT < 128 and i_s == tl.num_programs(2) - 1:
        p_z_tail = None if p_zeros is None else p_z[:, None]
        acc = _tail_products(
            acc, p_x_rows, m_x, p_row, p_s[:, None], p_z_tail, K, o_high, FORMAT, GROUP, COMPUTE, 16
        )
    if p_bias is not None:  # noqa: SIM102  the compiler settles this one, and the GPU the other
        if i_s == 0:
            acc += tl.load(one_of(p_bias, layer) + row).to(tl.float32)[:, None]
    p_y += (i_s.to(tl.int64) * total_of(N) + n_before) * M
    p_tile = p_y + o_m.to(tl.int64)[None, :] * n_rows + o_n[:, None]
    tl.store(p_tile, acc.to(p_y.dtype.element_ty), mask=m_x & (o_n < n_rows)[:, None])


@triton.jit(do_not_specialize=["n_splits"])
def reduce_kernel(p_partial, p_y, n, n_splits, BLOCK: tl.constexpr):
    """y[i] = sum over splits of partial[split, i], in order, of n numbers; grid (cdiv(n, BLOCK),)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(n_splits):
        total += tl.load(p_partial + o, mask=o < n, other=0.0)
        p_partial += n
    tl.store(p_y + o, total.to(p_y.dtype.element_ty), mask=o < n)
