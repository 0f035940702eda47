"""From packed lanes to numbers in a Triton kernel: fields of 16-bit lanes, two codes at a time.

A field of b bits at position s of a lane (see `vlmq.kernels.packing`) is taken out of two lanes at once, in
one 32-bit register, by one AND and one packed fused multiply-add:

    n = (w >> r) & ((2^b - 1) << k)          s = r + k,  r in {0, 8},  k + b <= 8
    f = n 2^-m                               the same bits read as float16 (m = 24) or bfloat16 (m = 133)
    a = f 2^(e - k) - c 2^(e - m) = (q - c) 2^(e - m)

The lower 8 bits of both float formats are linear: below 2^8 a bit pattern n stands for n 2^-m exactly, subnormal
or not, and the multiply-add of both formats takes subnormal numbers (NVIDIA PTX ISA, "Half Precision Floating
Point Instructions", fma without .ftz). So there is no magic number to subtract, and c, a constant or the zero point of
a group, costs nothing: (q - c) is a multiple of 2^(b - 8) below 2^b, eight bits and a sign, exact in both formats.
The power of two that is left, `unscale`, goes into the scale of the group in float32.

Three bits are two fields, q = lo + 4 hi. Two-plane formats have one field per plane (binary2), or the two digits
of a code below 9 (ternary2: d1 = 11 q >> 5, d0 - 1 = (q - 4) - 3 (d1 - 1)).

Each asm form has a twin of shifts and casts that gives the same numbers: Triton's interpreter runs it, which has
no inline assembly and takes bfloat16 for integers, so that there everything is computed in float32.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def codes_per_plane(bits):
    """Codes of a plane of a block of 128, and lanes of the block; of 3-bit codes, of the part of the low two bits."""
    return 8 * (2 if bits == 3 else bits)


@triton.constexpr_function
def unscale(dtype, bits):
    """2^(m - e): what a number from `field` must be multiplied by."""
    m, e = _exponents(dtype, bits)
    return 2.0 ** (m - e)


@triton.constexpr_function
def _down(dtype, bits):
    return 1 / unscale(dtype, bits)


@triton.constexpr_function
def field_asm(dtype, width, position, exponent, addend, shifted):
    """Assembly for (field - c) 2^(e - m) of two lanes, the first operand.

    Args:
        dtype: tl.float16 or tl.bfloat16.
        width: bits of the field.
        position: its lowest bit in the lane.
        exponent: e.
        addend: -c 2^(e - m), or None where it is the second operand.
        shifted: whether the last operand, 0 or 1, is added to the position; fields of one bit, position below 15.
    """
    down, k = divmod(position, 8)
    kind = _kind(dtype)
    source = "$1"
    lines = ["{ .reg .b32 s, t, f, c;"]
    if shifted:
        # The bits that cross into the lower lane end above any field.
        lines.append(f"and.b32 s, ${3 if addend is None else 2}, 1; shr.b32 t, $1, s;")
        source = "t"
    if down:
        lines.append(f"shr.b32 t, {source}, 8;")
        source = "t"
    lines.append(f"and.b32 t, {source}, {_pair(((1 << width) - 1) << k)};")
    lines.append(f"mov.b32 f, {_pair(_bits_of(2.0 ** (exponent - k), dtype))};")
    lines.append("mov.b32 c, $2;" if addend is None else f"mov.b32 c, {_pair(_bits_of(addend, dtype))};")
    lines.append(f"fma.rn.{kind} $0, t, f, c; }}")
    return " ".join(lines)


@triton.constexpr_function
def ternary2_asm(dtype, position, exponent, term):
    """Assembly for (d_term - 1) 2^(e - m) of two lanes of 4-bit codes."""
    kind = _kind(dtype)
    one = 2.0 ** (exponent - _mantissa(dtype))

    def constant(value):
        return _pair(_bits_of(value, dtype))

    lines = ["{ .reg .b32 q, d, f, c;"]
    lines.append(f"shr.b32 q, $1, {position};" if position else "mov.b32 q, $1;")
    lines.append(f"and.b32 q, q, {_pair(15)};")
    lines.append("mul.lo.u32 d, q, 11;")
    lines.append(f"and.b32 d, d, {_pair(0x60)};")
    lines.append(f"mov.b32 f, {constant(2.0 ** (exponent - 5))};")
    lines.append(f"mov.b32 c, {constant(-one)};")
    if term == 1:
        lines.append(f"fma.rn.{kind} $0, d, f, c; }}")
        return " ".join(lines)
    lines.append(f"fma.rn.{kind} d, d, f, c;")
    lines.append(f"mov.b32 f, {constant(2.0**exponent)};")
    lines.append(f"mov.b32 c, {constant(-4 * one)};")
    lines.append(f"fma.rn.{kind} q, q, f, c;")
    lines.append(f"mov.b32 f, {constant(-3.0)};")
    lines.append(f"fma.rn.{kind} $0, d, f, q; }}")
    return " ".join(lines)


@triton.constexpr_function
def _exponents(dtype, bits):
    # The high bit of a 3-bit code is multiplied by 4, which must stay below the largest power of two.
    largest = 15 if dtype == tl.float16 else 127
    return _mantissa(dtype), largest - (2 if bits == 3 else 0)


@triton.constexpr_function
def _exponent(dtype, bits):
    return _exponents(dtype, bits)[1]


@triton.constexpr_function
def _mantissa(dtype):
    return 24 if dtype == tl.float16 else 133


@triton.constexpr_function
def _kind(dtype):
    return "f16x2" if dtype == tl.float16 else "bf16x2"


@triton.constexpr_function
def _bits_of(value, dtype):
    """Bit pattern of zero or a normal number that the 16-bit float format holds exactly."""
    if value == 0:
        return 0
    bias, n_mantissa = (15, 10) if dtype == tl.float16 else (127, 7)
    sign = 1 if value < 0 else 0
    value = -value if sign else value
    exponent = 0
    while value >= 2:
        value, exponent = value / 2, exponent + 1
    while value < 1:
        value, exponent = value * 2, exponent - 1
    mantissa = (value - 1) * 2**n_mantissa
    assert mantissa == mantissa // 1, f"{value} does not fit the mantissa"
    assert 0 < exponent + bias < 2 * bias + 1, f"2 ** {exponent} does not fit the exponent"
    return sign << 15 | exponent + bias << n_mantissa | int(mantissa)


@triton.constexpr_function
def _pair(half):
    return f"0x{half << 16 | half:08x}"


@triton.jit
def zero_addend(zeros, BITS: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """-z 2^(e - m) of stored zero points (uint8), in the dtype of the numbers: exact."""
    return (zeros.to(tl.float32) * (-(2.0 ** (BITS - 8)) * _down(DTYPE, BITS))).to(COMPUTE)


@triton.jit
def second_eight(p_lanes, K, COLUMNS: tl.constexpr):
    """(1, COLUMNS) uint16: 1 in the upper eight of each sixteen columns, else 0; what `field` takes as `second`.

    The condition is never true and nothing is read; but the compiler takes a change of layout from what is computed
    back only to loads and constants. From a plain range every plane of codes would go through shared memory.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(p_lanes + column, mask=column < tl.minimum(K, 0), other=(column // 8 % 2).to(tl.uint16))


@triton.jit
def field(
    lanes,
    high,
    second,
    addend,
    POSITION: tl.constexpr,
    BITS: tl.constexpr,
    CENTRE: tl.constexpr,
    SHIFTED: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """(q - c) / unscale of the codes at one position of the lanes.

    Args:
        lanes: (rows, lanes) uint16; of 3-bit codes, the part of the low two bits.
        high: (rows, lanes) uint16, read of 3-bit codes only: the third bit of the same codes.
        second: (1, lanes) uint16, 0 or 1, the same for lanes 2i and 2i + 1: added to the position of 1-bit codes if
            SHIFTED, and to the position of the third bit. Shifting here, not before, leaves the lanes as they are
            loaded, which the compiler can bring into the operand's layout without a way through shared memory.
        addend: (rows, 1) from `zero_addend`, read where CENTRE is None.
        POSITION: lowest bit of the codes in the lanes.
        BITS: width of a code.
        CENTRE: c where there is no zero point, else None.
        DTYPE: tl.float16 or tl.bfloat16, which fixes the power of two.
        COMPUTE: dtype of the result: DTYPE, or float32 in the interpreter for bfloat16.
        ASM: whether to use assembly.

    Returns:
        (rows, lanes) in COMPUTE.
    """
    DOWN: tl.constexpr = _down(DTYPE, BITS)
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    if ASM:
        E: tl.constexpr = _exponent(DTYPE, BITS)
        ADDEND: tl.constexpr = None if CENTRE is None else -CENTRE * DOWN
        asm: tl.constexpr = field_asm(DTYPE, WIDTH, POSITION, E, ADDEND, SHIFTED)
        if CENTRE is None and SHIFTED:
            a = tl.inline_asm_elementwise(asm, "=r,r,r,r", [lanes, addend, second], tl.uint16, True, 2)
        elif CENTRE is None:
            a = tl.inline_asm_elementwise(asm, "=r,r,r", [lanes, addend], tl.uint16, True, 2)
        elif SHIFTED:
            a = tl.inline_asm_elementwise(asm, "=r,r,r", [lanes, second], tl.uint16, True, 2)
        else:
            a = tl.inline_asm_elementwise(asm, "=r,r", [lanes], tl.uint16, True, 2)
        if BITS == 3:
            asm_high: tl.constexpr = field_asm(DTYPE, 1, POSITION, E + 2, None, True)
            a = tl.inline_asm_elementwise(asm_high, "=r,r,r,r", [high, a, second], tl.uint16, True, 2)
        a = a.to(DTYPE, bitcast=True)
    else:
        q = lanes.to(tl.int32) >> POSITION
        if SHIFTED:
            q = q >> second.to(tl.int32)
        q = q & ((1 << WIDTH) - 1)
        if BITS == 3:
            q += ((high.to(tl.int32) >> POSITION >> second.to(tl.int32)) & 1) << 2
        if CENTRE is None:
            a = (q.to(tl.float32) * DOWN + addend.to(tl.float32)).to(COMPUTE)
        else:
            a = ((q.to(tl.float32) - CENTRE) * DOWN).to(COMPUTE)
    return a


@triton.jit
def digit(
    lanes,
    TERM: tl.constexpr,
    POSITION: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """As `field`, for plane TERM of a two-plane format: (d - 1) / unscale for ternary2 (4 bits), (d - 1/2) / unscale
    for binary2 (2 bits)."""
    if BITS == 2:
        a = field(lanes, lanes, lanes, lanes, POSITION + TERM, 1, 0.5, False, DTYPE, COMPUTE, ASM)
    else:
        tl.static_assert(BITS == 4)
        if ASM:
            asm: tl.constexpr = ternary2_asm(DTYPE, POSITION, _exponent(DTYPE, BITS), TERM)
            a = tl.inline_asm_elementwise(asm, "=r,r", [lanes], tl.uint16, True, 2)
            a = a.to(DTYPE, bitcast=True)
        else:
            q = (lanes.to(tl.int32) >> POSITION) & 15
            d = q // 3 if TERM == 1 else q % 3
            a = ((d - 1).to(tl.float32) * _down(DTYPE, BITS)).to(COMPUTE)
    return a


@triton.jit
def gather_codes(p_rows, k, n_lanes, n_lanes_high, o_lanes, o_high, BITS: tl.constexpr):
    """Codes of one block, one load per code; for blocks of any number of lanes.

    Args:
        p_rows: (rows, 1) pointers to the packed rows, uint16.
        k: (1, codes) index of each code in its block.
        n_lanes: lanes of the block (of its low part at 3 bits); n_lanes_high: of the part of the third bit.
        o_lanes: lanes before the block in its row; o_high: those before the block's part of the third bit.
        BITS: width of a code.

    Returns:
        (rows, codes) int32. Indices beyond the block's codes must not read beyond its lanes: they are the caller's.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    lanes = tl.load(p_rows + o_lanes + k % n_lanes).to(tl.int32)
    q = (lanes >> (k // n_lanes * WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        high = tl.load(p_rows + o_high + k % n_lanes_high).to(tl.int32)
        q += ((high >> (k // n_lanes_high)) & 1) << 2
    return q


@triton.jit
def weights_of(
    q, p_scales, p_zeros, BITS: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr
):
    """W = sum_t s_t (L[q, t] - z) in float32, rounded as the reference rounds it.

    Args:
        q: (rows, codes) int32.
        p_scales: (rows, codes) pointers to the first scale of each code's group, float16.
        p_zeros: (rows, codes) pointers to the zero points, uint8, or None.
        FIRST, STEP: first level and distance of the levels, of formats of one term.
    """
    s = tl.load(p_scales).to(tl.float32)
    if TERMS == 1:
        level = q.to(tl.float32) * STEP + FIRST
        if p_zeros is not None:
            level -= tl.load(p_zeros).to(tl.float32) * 2.0 ** (BITS - 8)
        w = level * s
    else:
        s1 = tl.load(p_scales + 1).to(tl.float32)
        if BITS == 2:
            w = (2 * (q & 1) - 1).to(tl.float32) * s + (2 * (q >> 1) - 1).to(tl.float32) * s1
        else:
            tl.static_assert(BITS == 4)
            third = q * 11 >> 5
            w = (q - 3 * third - 1).to(tl.float32) * s + (third - 1).to(tl.float32) * s1
    return w
