"""The inline assembly, run by a small PTX machine: every code, zero point and position, exactly.

The interpreter has no inline assembly and no GPU is here, so the text is executed as the PTX manual says: both halves
of a register apart, subnormal numbers kept.
"""

import re
from fractions import Fraction

import numpy as np
import pytest

tl = pytest.importorskip("triton.language", reason="triton is not installed")

from vlmq.kernels import triton_unpack  # noqa: E402

DTYPES = [tl.float16, tl.bfloat16]


def to_numbers(register: np.ndarray, dtype) -> list[np.ndarray]:
    """Both halves of uint32 registers as float64, exactly."""
    halves = [register & 0xFFFF, register >> 16]
    if dtype == tl.float16:
        return [h.astype(np.uint16).view(np.float16).astype(np.float64) for h in halves]
    return [(h.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for h in halves]


def to_register(numbers: list[np.ndarray], dtype) -> np.ndarray:
    """The reverse; every number must be one that the format holds."""
    if dtype == tl.float16:
        bits = [n.astype(np.float16).view(np.uint16).astype(np.uint32) for n in numbers]
    else:
        bits = [n.astype(np.float32).view(np.uint32) >> 16 for n in numbers]
    register = bits[0] | bits[1] << 16
    for stored, number in zip(to_numbers(register, dtype), numbers, strict=True):
        assert np.array_equal(stored, number), "a result is rounded"
    return register


def run(asm: str, dtype, *operands: np.ndarray) -> np.ndarray:
    """Execute one block of assembly on uint32 operands $1, $2, ..."""
    registers = {f"${i}": operand for i, operand in enumerate(operands, 1)}

    def value(name: str):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in re.sub(r"\{ \.reg [^;]*;|\}", "", asm).split(";"):
        if not line.strip():
            continue
        op, rest = line.split(maxsplit=1)
        target, *sources = (part.strip() for part in rest.split(","))
        args = [value(source) for source in sources]
        if op == "and.b32":
            registers[target] = args[0] & args[1]
        elif op == "shr.b32":
            registers[target] = args[0] >> args[1]
        elif op == "mov.b32":
            registers[target] = args[0] + np.zeros_like(operands[0])
        elif op == "mul.lo.u32":
            registers[target] = args[0] * args[1]
        else:
            assert op == ("fma.rn.f16x2" if dtype == tl.float16 else "fma.rn.bf16x2"), op
            a, b, c = (to_numbers(arg, dtype) for arg in args)
            # Exact in float64: eight bits times a power of two, plus a number of nearly the same size.
            registers[target] = to_register([x * y + z for x, y, z in zip(a, b, c, strict=True)], dtype)
    return registers["$0"]


def lanes_with(codes: np.ndarray, bits: int, position: int, noise: np.ndarray) -> np.ndarray:
    """Registers of two lanes: codes (n, 2) at the position, other bits from the noise."""
    mask = np.uint32(((1 << bits) - 1) << position)
    lane = [(noise[:, i] & ~mask & 0xFFFF) | codes[:, i].astype(np.uint32) << position for i in range(2)]
    return (lane[0] | lane[1] << 16).astype(np.uint32)


def cases(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of codes (a sample at 8 bits), and random other bits."""
    rng = np.random.default_rng(0)
    first, second = np.meshgrid(np.arange(2**bits), np.arange(2**bits))
    codes = np.stack([first.ravel(), second.ravel()], 1)[:: 17 if bits == 8 else 1]
    return codes, rng.integers(0, 2**16, codes.shape, dtype=np.uint32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "centre"), [(1, 0.5), (2, 1.0), (2, 2.0), (4, 8.0), (8, 128.0)])
def test_field_with_constant_centre_is_exact(dtype, bits, centre):
    codes, noise = cases(bits)
    exponent, down = triton_unpack._exponent(dtype, bits), 1 / triton_unpack.unscale(dtype, bits)
    for position in range(0, 16, bits):
        asm = triton_unpack.field_asm(dtype, bits, position, exponent, -centre * down, False)
        got = to_numbers(run(asm, dtype, lanes_with(codes, bits, position, noise)), dtype)
        for half in range(2):
            assert np.array_equal(got[half], (codes[:, half] - centre) * down)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("zero", [0, 1, 127, 128, 255])
def test_field_with_zero_point_is_exact(dtype, bits, zero):
    codes, noise = cases(bits)
    exponent, down = triton_unpack._exponent(dtype, bits), 1 / triton_unpack.unscale(dtype, bits)
    addend = to_register([np.full(len(codes), -zero * 2.0 ** (bits - 8) * down)] * 2, dtype)
    for position in range(0, 16, bits):
        asm = triton_unpack.field_asm(dtype, bits, position, exponent, None, False)
        got = to_numbers(run(asm, dtype, lanes_with(codes, bits, position, noise), addend), dtype)
        for half in range(2):
            assert np.array_equal(got[half], (codes[:, half] - zero * 2.0 ** (bits - 8)) * down)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [0, 77, 255])
@pytest.mark.parametrize("shift", [0, 1])
def test_three_bits_of_two_parts_are_exact(dtype, zero, shift):
    codes, noise = cases(3)
    exponent, down = triton_unpack._exponent(dtype, 3), 1 / triton_unpack.unscale(dtype, 3)
    addend = to_register([np.full(len(codes), -zero / 32 * down)] * 2, dtype)
    shifts = np.full(len(codes), shift * 0x10001, dtype=np.uint32)
    for position in range(0, 16, 2):
        low = triton_unpack.field_asm(dtype, 2, position, exponent, None, False)
        high = triton_unpack.field_asm(dtype, 1, position, exponent + 2, None, True)
        a = run(low, dtype, lanes_with(codes & 3, 2, position, noise), addend)
        got = run(high, dtype, lanes_with(codes >> 2, 1, position + shift, noise), a, shifts)
        for half, numbers in enumerate(to_numbers(got, dtype)):
            assert np.array_equal(numbers, (codes[:, half] - zero / 32) * down)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shifted_field_of_one_bit_is_exact(dtype):
    codes, noise = cases(1)
    exponent, down = triton_unpack._exponent(dtype, 1), 1 / triton_unpack.unscale(dtype, 1)
    shifts = np.full(len(codes), 0x10001, dtype=np.uint32)
    for position in range(0, 16, 2):
        asm = triton_unpack.field_asm(dtype, 1, position, exponent, -0.5 * down, True)
        got = run(asm, dtype, lanes_with(codes, 1, position + 1, noise), shifts)
        for half, numbers in enumerate(to_numbers(got, dtype)):
            assert np.array_equal(numbers, (codes[:, half] - 0.5) * down)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("term", [0, 1])
def test_digits_of_two_ternary_planes_are_exact(dtype, term):
    codes, noise = cases(4)
    keep = (codes < 9).all(1)
    codes, noise = codes[keep], noise[keep]
    exponent, down = triton_unpack._exponent(dtype, 4), 1 / triton_unpack.unscale(dtype, 4)
    digits = codes // 3 if term else codes % 3
    for position in range(0, 16, 4):
        asm = triton_unpack.ternary2_asm(dtype, position, exponent, term)
        got = to_numbers(run(asm, dtype, lanes_with(codes, 4, position, noise)), dtype)
        for half in range(2):
            assert np.array_equal(got[half], (digits[:, half] - 1) * down)


def test_the_machine_notices_a_rounded_result():
    one = np.array([0x3C003C00], dtype=np.uint32)
    asm = "{ .reg .b32 f; mov.b32 f, 0x10001000; fma.rn.f16x2 $0, $1, $1, f; }"
    with pytest.raises(AssertionError, match="rounded"):
        run(asm, tl.float16, one)


def test_scale_is_a_power_of_two():
    for dtype in DTYPES:
        for bits in (1, 2, 3, 4, 8):
            assert Fraction(triton_unpack.unscale(dtype, bits)).numerator.bit_count() == 1
