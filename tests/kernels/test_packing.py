"""The packed layout: what it is, bit by bit, and that nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq.kernels.packing import BITS, pack, row_bytes, unpack

SIZES = [1, 2, 15, 16, 17, 64, 127, 128, 129, 255, 576, 3420, 4304]


def random_codes(rows: int, in_features: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, in_features), dtype=torch.uint8, generator=generator)


def pack_row(codes: list[int], bits: int) -> list[int]:
    """The layout of the module docstring, one code at a time."""
    if bits == 3:
        return pack_row([q & 3 for q in codes], 2) + pack_row([q >> 2 for q in codes], 1)
    row: list[int] = []
    for start in range(0, len(codes), 128):
        block = codes[start : start + 128]
        n_lanes = -(-len(block) * bits // 16)
        lanes = [0] * n_lanes
        for k, code in enumerate(block):
            lanes[k % n_lanes] |= code << bits * (k // n_lanes)
        for lane in lanes:
            row += lane.to_bytes(2, "little")
    return row


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("in_features", SIZES)
def test_pack_follows_the_layout(bits, in_features):
    codes = random_codes(2, in_features, bits)
    expected = torch.tensor([pack_row(row, bits) for row in codes.tolist()], dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, expected)
    assert packed.shape == (2, row_bytes(in_features, bits))


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [1, 2, 3], "01030200"),
        (4, [1, 2, 3, 4, 5], "31054200"),
        (2, [0, 1, 2, 3, 1, 2, 3, 0, 1], "d8012d00"),
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1, 1], "0103"),
        (3, [7, 4, 3], "33000300"),
    ],
)
def test_pack_writes_these_bytes(bits, codes, expected):
    packed = pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.numpy().tobytes().hex() == expected


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 4),
    in_features=st.one_of(st.sampled_from(SIZES), st.integers(1, 300)),
    seed=st.integers(0, 2**16),
)
def test_unpack_inverts_pack(bits, rows, in_features, seed):
    codes = random_codes(rows, in_features, bits, seed)
    assert torch.equal(unpack(pack(codes, bits), bits, in_features), codes)


@pytest.mark.parametrize("bits", BITS)
def test_pack_inverts_unpack_of_whole_blocks(bits):
    packed = random_codes(3, row_bytes(256, bits), 8)
    assert torch.equal(pack(unpack(packed, bits, 256), bits), packed)


@pytest.mark.parametrize("bits", BITS)
def test_pack_takes_strided_codes(bits):
    codes = random_codes(200, 6, bits).T[::2]
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(codes.contiguous(), bits))
    both = torch.cat([packed, packed], dim=1)
    assert torch.equal(unpack(both[:, packed.shape[1] :], bits, 200), codes)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_pack_is_the_same_on_a_gpu(bits):
    codes = random_codes(5, 300, bits)
    packed = pack(codes.cuda(), bits)
    assert torch.equal(packed.cpu(), pack(codes, bits))
    assert torch.equal(unpack(packed, bits, 300).cpu(), codes)


@pytest.mark.parametrize(("bits", "per_block"), [(1, 16), (2, 32), (3, 48), (4, 64), (8, 128)])
def test_row_bytes_of_a_whole_block_has_no_padding(bits, per_block):
    assert row_bytes(128, bits) == per_block
    assert row_bytes(4096, bits) == 32 * per_block


@pytest.mark.parametrize("bits", BITS)
def test_row_bytes_wastes_less_than_a_lane_per_part(bits):
    n_parts = 2 if bits == 3 else 1
    for in_features in range(1, 400):
        waste = row_bytes(in_features, bits) * 8 - in_features * bits
        assert 0 <= waste < 16 * n_parts


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), 4, r"codes must be .* torch.uint8, got \(2, 4\) torch.int64"),
        (torch.zeros(4, dtype=torch.uint8), 4, r"codes must be .* got \(4,\) torch.uint8"),
        (torch.full((2, 4), 9, dtype=torch.uint8), 3, "codes of 3 bits must be below 8, got 9"),
        (torch.zeros(2, 4, dtype=torch.uint8), 5, r"5 bits cannot be packed; widths: \(1, 2, 3, 4, 8\)"),
        (torch.zeros(2, 0, dtype=torch.uint8), 4, "at least one code, got in_features 0"),
    ],
)
def test_pack_refuses(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, bits)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(2, 31, dtype=torch.uint8), r"must be \(out_features, 32\) torch.uint8, got \(2, 31\)"),
        (torch.zeros(2, 32, dtype=torch.int32), r"got \(2, 32\) torch.int32"),
        (torch.zeros(32, dtype=torch.uint8), r"got \(32,\) torch.uint8"),
    ],
)
def test_unpack_refuses(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack(packed, 2, 128)
