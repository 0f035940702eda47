"""Ternary codes in five trits a byte: exact both ways, as wide as promised, and no byte read as something else."""

import pytest
import torch

from vlmq.kernels import trits
from vlmq.kernels.packing import pack, row_bytes
from vlmq.kernels.trits import from_trits, stored_bytes, to_trits

WIDTHS = (1, 5, 9, 16, 17, 64, 128, 130, 200, 577)


@pytest.mark.parametrize("in_features", WIDTHS)
@pytest.mark.parametrize(("bits", "n_levels"), [(2, 3), (4, 9)])
def test_round_trip_is_exact_at_a_fifth_less(bits, n_levels, in_features, monkeypatch):
    monkeypatch.setattr(trits, "CHUNK_BYTES", 300)
    generator = torch.Generator().manual_seed(in_features)
    codes = torch.randint(0, n_levels, (7, in_features), generator=generator).to(torch.uint8)
    codes[0], codes[1] = 0, n_levels - 1
    packed = pack(codes, bits)
    stored = to_trits(packed, bits)
    assert stored.shape == (7, -(-row_bytes(in_features, bits) * 4 // 5))
    assert int(stored.max()) < 243
    assert torch.equal(from_trits(stored, bits, packed.shape[1]), packed)


def test_every_row_of_five_bytes_is_as_the_docstring_says():
    """Rank of each of the first four bytes plus 81 times a digit of the rank of the fifth."""
    rank = {(a | b << 2 | c << 4 | d << 6): a + 3 * b + 9 * c + 27 * d for a, b, c, d in _fours()}
    packed = torch.tensor(list(rank), dtype=torch.uint8)[torch.randint(0, 81, (50, 5))]
    for row, stored in zip(packed.tolist(), to_trits(packed, 2).tolist(), strict=True):
        digits = [rank[row[4]] // 3**c % 3 for c in range(4)]
        assert stored == [rank[byte] + 81 * digit for byte, digit in zip(row[:4], digits, strict=True)]


def _fours() -> list[tuple[int, int, int, int]]:
    return [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_byte_above_242_is_read_as_codes_that_are_not_ternary(bits):
    stored = torch.zeros(13, 4, dtype=torch.uint8)
    stored[:, 2] = torch.arange(243, 256)
    packed = from_trits(stored, bits, 5)
    assert (packed[:, 2] == 255).all()
    assert (packed[:, [0, 1, 3, 4]] == 0).all()


def test_other_codes_are_refused():
    packed = torch.zeros(2, 10, dtype=torch.uint8)
    packed[1, 9] = 0x30
    with pytest.raises(ValueError, match="codes of 2 bits must be below 3 to be stored in trits"):
        to_trits(packed, 2)
    with pytest.raises(ValueError, match="codes of 3 bits are not stored in trits"):
        from_trits(packed, 3, 12)


def test_five_trits_take_one_byte():
    assert stored_bytes(row_bytes(4096, 2)) * 8 / 4096 == pytest.approx(1.6, abs=0.002)
