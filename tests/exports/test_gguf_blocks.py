"""Blocks of GGUF: exactly the packed values, by gguf's own reading or, for newer types, by one written down here."""

import gguf
import numpy as np
import pytest
import torch
from packed_models import round_to_nearest

from vlmq.exports.gguf_blocks import COMMON, SMALLEST, TYPES, to_blocks, with_offsets
from vlmq.scheme import parse_scheme


def weight(scheme, rows=5, width=512):
    generator = torch.Generator().manual_seed(7)
    return round_to_nearest(torch.randn(rows, width, generator=generator), parse_scheme(scheme))


def read_two_bits(data, n_weights, bits, values):
    """Rows of blocks that begin with a scale, element by element."""
    rows = []
    for row in data.tolist():
        out = []
        for start in range(0, len(row), 18):
            block = bytes(row[start : start + 18])
            d = float(np.frombuffer(block[:2], np.float16)[0])
            for i in range(n_weights):
                code = block[2 + i * bits // 8] >> (i * bits % 8) & (2**bits - 1)
                out.append(d * values[code])
        rows.append(out)
    return torch.tensor(rows)


def read(blocks):
    if blocks.type.name == "Q1_0":
        return read_two_bits(blocks.data, 128, 1, (-1, 1))
    if blocks.type.name == "Q2_0":
        return read_two_bits(blocks.data, 64, 2, (-1, 0, 1, 2))
    number = gguf.GGMLQuantizationType[blocks.type.name]
    assert number.value == blocks.type.number
    return torch.from_numpy(gguf.quants.dequantize(blocks.data.numpy(), number))


@pytest.mark.parametrize(
    ("scheme", "common", "smallest"),
    [
        ("ternary-channel", "TQ2_0", "TQ1_0"),
        ("ternary-g128", "Q4_0", "Q2_0"),
        ("ternary-g32", "Q4_0", "Q4_0"),
        ("binary-sym-channel", "TQ2_0", "Q1_0"),
        ("binary-sym-g128", "Q4_0", "Q1_0"),
        ("int2-sym-channel", "Q2_K", "Q2_0"),
        ("int2-sym-g64", "Q4_0", "Q2_0"),
        ("int3-sym-channel", "Q3_K", "Q3_K"),
        ("int3-sym-g64", "Q4_0", "Q4_0"),
        ("int4-sym-g32", "Q4_0", "Q4_0"),
        ("int4-sym-channel", "Q4_0", "Q4_0"),
        ("int8-sym-g64", "Q8_0", "Q8_0"),
    ],
)
def test_blocks_hold_the_packed_values(scheme, common, smallest):
    packed = weight(scheme)
    for types, expected in ((COMMON, common), (SMALLEST, smallest)):
        blocks = to_blocks(packed, types)
        assert blocks.type.name == expected
        assert blocks.shape == packed.codes.shape
        assert torch.equal(read(blocks), packed.dequantize())


@pytest.mark.parametrize("name", [name for name in TYPES if name in gguf.GGMLQuantizationType.__members__])
def test_sizes_are_those_of_the_package(name):
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert size == (TYPES[name].n_weights, TYPES[name].n_bytes)


def test_a_width_of_no_256_takes_smaller_blocks():
    blocks = to_blocks(weight("ternary-channel", width=96), COMMON)
    assert blocks.type.name == "Q4_0"


def test_zero_points_on_levels_are_subtracted():
    packed = weight("int4-g64")
    packed.zeros.bitwise_and_(0xF0)
    blocks = to_blocks(packed, COMMON)
    assert blocks.type.name == "Q5_0"
    assert torch.equal(read(blocks), packed.dequantize())


@pytest.mark.parametrize(
    ("scheme", "width", "reason"),
    [
        ("int4-sym-g16", 64, "groups of 16 are no whole blocks of 32"),
        ("int4-sym-g32", 48, "48 inputs, which are no blocks of 32"),
        ("ternary2-g32", 64, "adds planes"),
        ("int4-g32", 64, "between two whole numbers"),
        ("int8-g32", 64, "a block -128 to 127"),
    ],
)
def test_what_no_block_can_say_is_refused(scheme, width, reason):
    with pytest.raises(ValueError, match=reason):
        to_blocks(weight(scheme, width=width), SMALLEST)


@pytest.mark.parametrize(
    "scheme", ["int4-g32", "int3-g64", "int2-channel", "ternary-offset-g32", "binary-g128"]
)
def test_offsets_are_all_that_is_rounded(scheme):
    packed = weight(scheme)
    blocks, values = with_offsets(packed)
    assert torch.equal(read(blocks), values)
    before = packed.dequantize()
    assert 0 < float((values - before).norm() / before.norm()) < 1e-3


def test_offsets_of_symmetric_weights_are_exact():
    packed = weight("binary-sym-g32")
    assert torch.equal(with_offsets(packed)[1], packed.dequantize())


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [("ternary2-g32", "one plane"), ("int8-g32", "256 codes"), ("int4-g16", "groups of 16")],
)
def test_what_has_no_offset_is_refused(scheme, reason):
    with pytest.raises(ValueError, match=reason):
        with_offsets(weight(scheme))
