"""Numbers in a stream of bits: against arithmetic on one big integer."""

import pytest
import torch

from vlmq.words import from_words, to_words


def stream_oracle(numbers, bits):
    """The words of one line, cut from the number that the whole line is."""
    whole = sum(number << (bits * k) for k, number in enumerate(numbers))
    n_words = -(-len(numbers) * bits // 32)
    return [(whole >> (32 * j)) % 2**32 for j in range(n_words)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 11, 32, 45])
def test_words_are_the_stream_and_come_back(bits, n):
    numbers = torch.randint(0, 2**bits, (3, n))
    numbers[0] = 2**bits - 1
    words = to_words(numbers, bits)
    assert words.dtype == torch.int32
    assert [[w % 2**32 for w in line] for line in words.tolist()] == [
        stream_oracle(line, bits) for line in numbers.tolist()
    ]
    assert torch.equal(from_words(words, bits, n), numbers.to(torch.uint8))
