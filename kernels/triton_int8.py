"""Decode with 8-bit activations: four codes times four activations in one instruction (dp4a), sums in integers.

    y[m, o] = s[o] sx[m] (sum_k q[o, k] xq[m, k] - c[o] sum_k xq[m, k])
    xq = floor(x / sx + 1/2),  sx = max |x| / 127 of the token

At 2 bits and below, a GPU cannot unpack codes to floats as fast as it reads them; four bytes of codes are one mask. It
rounds activations, so it is never chosen unasked: call `quant_linear`.

A 32-bit word j of a block holds lanes 2j and 2j + 1 (`vlmq.kernels.packing`). Masked at the bits from b i on, its four
bytes are 2^(b i) times the codes k = L i + 2j + (0, 64, 1, 65), L = 8 b lanes, for every width b. Activations are
stored as words of the same order, (tokens, 8 / b, words of a row) int32, by the kernel that quantizes them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmq.formats import get_format
from vlmq.kernels.parts import Layer, by_part, checked_layers, rows_of
from vlmq.kernels.triton_layers import layer_of, one_of, total_of
from vlmq.kernels.triton_linear import (
    kernel_format,
    launch_options,
    n_processors,
    on_device,
    sum_splits,
)

ONES = tl.constexpr(0x01010101)
BLOCK_N = 8


@triton.constexpr_function
def field_mask(bits, position):
    """Mask of the field at a position of each byte of a word, as a signed number."""
    mask = ((1 << bits) - 1) * 0x01010101 << bits * position
    return mask - 2**32 if mask >= 2**31 else mask


@triton.jit
def quantize_kernel(
    p_x, p_words, p_scales, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Quantize a row of x to int8 words, BLOCK words of each position; grid (tokens, cdiv(words of a row, BLOCK)).

    Args:
        p_x: (tokens, K), K a multiple of 128. p_words: (tokens, 8 / BITS, K * BITS / 32) int32.
        p_scales: (tokens,) float32.
    """
    WORDS: tl.constexpr = 4 * BITS
    i_m = tl.program_id(0)
    p_row = p_x + i_m.to(tl.int64) * K
    # Each program of a row finds the largest anew: the row is in the cache, another launch would cost more.
    largest = tl.zeros([BLOCK_K], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        o = k + tl.arange(0, BLOCK_K)
        x = tl.load(p_row + o, mask=o < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    # A token that holds a NaN gets it as its scale; the reduction alone would pass over it.
    has_nan = tl.max((largest != largest).to(tl.int32), axis=0)
    top = tl.where(has_nan > 0, float("nan"), tl.max(largest, axis=0))
    inverse = tl.where(top > 0, 127.0 / tl.maximum(top, 1e-30), 0.0)
    n_words = K // 128 * WORDS
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_word = word < n_words
    for i in tl.static_range(8 // BITS):
        p_first = p_row + word // WORDS * 128 + i * 2 * WORDS + word % WORDS * 2
        packed = tl.zeros([BLOCK], dtype=tl.int32)
        for byte in tl.static_range(4):
            x = tl.load(p_first + byte // 2 + byte % 2 * 64, mask=m_word, other=0.0).to(tl.float32)
            q = tl.floor(x * inverse + 0.5).to(tl.int32)
            packed = packed | ((q & 255) << (8 * byte))
        tl.store(p_words + (i_m.to(tl.int64) * (8 // BITS) + i) * n_words + word, packed, mask=m_word)
    tl.store(p_scales + i_m, top / 127.0, mask=tl.program_id(1) == 0)


@triton.jit
def _dot4(codes, x, total, ASM: tl.constexpr):
    """total + the sum of four unsigned bytes of `codes` times four signed ones of `x`."""
    if ASM:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], tl.int32, True, 1
        )
    else:
        for byte in tl.static_range(4):
            total += ((codes >> (8 * byte)) & 255) * ((x << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def _quarters(words):
    """Four tensors (rows, columns) of the words (rows, 4 columns): one of each four neighbours, held by one thread."""
    even, odd = tl.split(tl.reshape(words, [words.shape[0], words.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _dot16(codes, x, total, ASM: tl.constexpr):
    """total (rows, columns) + the products of four words each of codes (rows, 4 columns) and x (1, 4 columns)."""
    c = _quarters(codes)
    a = _quarters(x)
    for i in tl.static_range(4):
        total = _dot4(c[i], a[i], total, ASM)
    return total


@triton.jit
def _add_products(
    t0,
    t1,
    t2,
    t3,
    x_total,
    w,
    p_x,
    m_w,
    n_words,
    BITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the products of w (rows, words) and x to the sums of the positions, and x (1, words) to its own sum.

    Codes are masked where they are, not shifted down: position j of each byte has a sum of its own, 2^(BITS j) times
    too large. After POSITIONS of them the word is shifted once, for the next ones.
    """
    for i in tl.static_range(8 // BITS):
        # [1, words]
        x = tl.load(p_x + i * n_words, mask=m_w, other=0)
        x_total = _dot16(x * 0 + ONES, x, x_total, ASM)
        codes = (w >> (BITS * (i - i % POSITIONS))) & field_mask(BITS, i % POSITIONS)
        if i % POSITIONS == 0:
            t0 = _dot16(codes, x, t0, ASM)
        elif i % POSITIONS == 1:
            t1 = _dot16(codes, x, t1, ASM)
        elif i % POSITIONS == 2:
            t2 = _dot16(codes, x, t2, ASM)
        else:
            t3 = _dot16(codes, x, t3, ASM)
    return t0, t1, t2, t3, x_total


@triton.jit
def _together(t0, t1, t2, t3, BITS: tl.constexpr, POSITIONS: tl.constexpr):
    """Sum over the positions j of t_j 2^(-BITS j), exactly."""
    total = (t0 << BITS) + t1
    if POSITIONS == 4:
        total = (((total << BITS) + t2) << BITS) + t3
    return total >> (BITS * (POSITIONS - 1))


@triton.jit(do_not_specialize=["M"])
def int8_matmul_kernel(
    p_words,
    p_x_scales,
    p_weight,
    p_scales,
    p_zeros,
    p_bias,
    p_y,
    M,
    N,
    n_words,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One split's partial sums of one token and BLOCK_N outputs; for one warp, so that rows share x in registers.

    Args:
        p_words, p_x_scales: of `quantize_kernel`.
        p_weight, p_scales, p_zeros, p_bias, N: one entry for each layer. p_weight: (N, n_words) int32. p_scales:
            (N, groups, 1) float16. p_zeros: (N, groups) uint8, or None for all. p_bias: (N,), or None for all.
        p_y: (M, N) of each layer, one after the other, for each split; float32.
        FORMAT: (bits, 1, first level, step of the levels), of 1, 2 or 4 bits.
        GROUP: 0 (one group per channel) or 128.

    Grid: (tiles of N of all layers, M, splits of the words).
    """
    BITS: tl.constexpr = FORMAT[0]
    WORDS: tl.constexpr = 4 * BITS
    COLUMNS: tl.constexpr = BLOCK_WORDS // 4
    POSITIONS: tl.constexpr = min(4, 8 // BITS)
    tl.static_assert(FORMAT[1] == 1 and (GROUP == 0 or GROUP == 128))
    i_m, i_s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    layer, i_n, n_rows, n_before = layer_of(tl.program_id(0), N, BLOCK_N)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(o_n, n_rows - 1).to(tl.int64)
    share = tl.cdiv(tl.cdiv(n_words, BLOCK_WORDS), tl.num_programs(2)) * BLOCK_WORDS
    n_groups = n_words // WORDS
    p_w = one_of(p_weight, layer) + row[:, None] * n_words
    p_s = one_of(p_scales, layer) + row[:, None] * n_groups
    p_z = None if p_zeros is None else one_of(p_zeros, layer) + row[:, None] * n_groups
    p_x = p_words + i_m * (8 // BITS) * n_words
    zeros = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.int32)
    t0, t1, t2, t3 = zeros, zeros, zeros, zeros
    x_total = tl.zeros([1, COLUMNS], dtype=tl.int32)
    acc = tl.zeros([BLOCK_N, COLUMNS], dtype=tl.float32)
    for start in range(i_s * share, tl.minimum((i_s + 1) * share, n_words), BLOCK_WORDS):
        o_w = start + tl.arange(0, BLOCK_WORDS)[None, :]
        m_w = o_w < n_words
        # [BLOCK_N, BLOCK_WORDS]
        # Words beyond the row meet activations of zero: what they hold does not count.
        w = tl.load(p_w + o_w, mask=m_w, eviction_policy="evict_first")
        if GROUP != 0:
            t0, t1, t2, t3 = zeros, zeros, zeros, zeros
            x_total = tl.zeros_like(x_total)
        t0, t1, t2, t3, x_total = _add_products(
            t0, t1, t2, t3, x_total, w, p_x + o_w, m_w, n_words, BITS, POSITIONS, ASM
        )
        if GROUP != 0:
            # [BLOCK_N, COLUMNS], parts of groups: the sum over a group is that of the columns at the end.
            t = _together(t0, t1, t2, t3, BITS, POSITIONS).to(tl.float32)
            o_g = tl.minimum((start + 4 * tl.arange(0, COLUMNS)) // WORDS, n_groups - 1)[None, :]
            s, centre = _line(p_s + o_g, None if p_zeros is None else p_z + o_g, FORMAT)
            acc += s * (t - centre * x_total.to(tl.float32))
    if GROUP == 0:
        t = tl.sum(_together(t0, t1, t2, t3, BITS, POSITIONS), axis=1).to(tl.float32)
        p_one = None if p_zeros is None else one_of(p_zeros, layer) + row
        s, centre = _line(one_of(p_scales, layer) + row, p_one, FORMAT)
        y = s * (t - centre * tl.sum(x_total).to(tl.float32))
    else:
        y = tl.sum(acc, axis=1)
    y *= tl.load(p_x_scales + i_m)
    if p_bias is not None:  # noqa: SIM102  the compiler settles this one, and the GPU the other
        if i_s == 0:
            y += tl.load(one_of(p_bias, layer) + row).to(tl.float32)
    p_y += (i_s.to(tl.int64) * total_of(N) + n_before) * M + i_m * n_rows
    tl.store(p_y + o_n, y, mask=o_n < n_rows)


@triton.jit
def _line(p_s, p_z, FORMAT: tl.constexpr):
    """Scale of a step of the levels, and the code that stands for zero; float32, in the shape of the pointers."""
    s = tl.load(p_s).to(tl.float32) * FORMAT[3]
    if p_z is None:
        centre = s * 0 - FORMAT[2] / FORMAT[3]
    else:
        centre = tl.load(p_z).to(tl.float32) * 2.0 ** (FORMAT[0] - 8)
    return s, centre


def why_not(format_name: str, in_features: int, group_size: int) -> str | None:
    """Return why a layer cannot be multiplied with 8-bit activations, None if it can."""
    fmt = get_format(format_name)
    if fmt.n_terms != 1 or fmt.bits not in (1, 2, 4):
        return f"takes one plane of 1, 2 or 4 bits, not {format_name}"
    if in_features % 128:
        return f"takes in_features in multiples of 128, not {in_features}"
    if group_size not in (0, 128):
        return f"takes groups of 128 and channels, not groups of {group_size}"
    return None


def quant_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
    *,
    use_assembly: bool | None = None,
) -> Tensor:
    """Apply the packed linear layer to activations that are rounded to 8 bits, one scale per token.

    Args:
        x: (..., in_features) float16, bfloat16 or float32; few tokens, as in decoding: each reads all weights anew.
        qweight: like the other arguments as in `vlmq.kernels.reference.quant_linear`.
        use_assembly: False for the plain form that the interpreter runs too.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: a format, size or group size that the kernel does not take (`why_not`), or a tensor whose shape,
            dtype or device does not fit the others.
    """
    layers = [(qweight, scales, zeros, bias)]
    y = quant_linears(x, layers, format_name, in_features, group_size, use_assembly=use_assembly)
    return y.view(*x.shape[:-1], qweight.shape[0])


def quant_linears(
    x: Tensor,
    layers: Sequence[Layer],
    format_name: str,
    in_features: int,
    group_size: int,
    *,
    use_assembly: bool | None = None,
) -> Tensor:
    """Apply packed linear layers of one format to the same x, rounded once, in one launch.

    Arguments as those of `quant_linear`; returns and raises as `vlmq.kernels.triton_linear.quant_linears`.
    """
    if reason := why_not(format_name, in_features, group_size):
        raise ValueError(f"decoding with 8-bit activations {reason}")
    fmt = get_format(format_name)
    rows = rows_of("x", x, in_features)
    layers = checked_layers(layers, format_name, in_features, group_size, x.device)
    n_tokens, widths = rows.shape[0], tuple(layer[0].shape[0] for layer in layers)
    y = torch.empty(n_tokens * sum(widths), dtype=x.dtype, device=x.device)
    if n_tokens:
        n_words = in_features * fmt.bits // 32
        n_tiles = sum(triton.cdiv(width, BLOCK_N) for width in widths)
        splits = 1
        while (
            splits < 16
            and splits * n_tiles * n_tokens <= 16 * n_processors(x.device)
            and 512 * splits <= n_words
        ):
            splits *= 2
        words = torch.empty(n_tokens, 8 // fmt.bits, n_words, dtype=torch.int32, device=x.device)
        x_scales = torch.empty(n_tokens, dtype=torch.float32, device=x.device)
        partial = torch.empty(splits, y.numel(), dtype=torch.float32, device=x.device)
        qweights, scales, zeros, biases = by_part(layers)
        with on_device(x):
            quantize_kernel[(n_tokens, triton.cdiv(n_words, 128))](
                rows,
                words,
                x_scales,
                in_features,
                BITS=fmt.bits,
                BLOCK_K=4096,
                BLOCK=128,
                **launch_options(8, 1),
            )
            int8_matmul_kernel[(n_tiles, n_tokens, splits)](
                words,
                x_scales,
                tuple(qweight.view(torch.int32) for qweight in qweights),
                scales,
                zeros,
                biases,
                partial,
                n_tokens,
                widths,
                n_words,
                FORMAT=kernel_format(fmt),
                GROUP=group_size,
                BLOCK_N=BLOCK_N,
                BLOCK_WORDS=128,
                ASM=not triton.knobs.runtime.interpret if use_assembly is None else use_assembly,
                **launch_options(1, 1),
            )
            sum_splits(partial, y)
    return y
