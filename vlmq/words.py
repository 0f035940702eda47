"""Numbers of 1 to 8 bits as one stream of bits in 32-bit words: the layout of compressed-tensors and of GPTQ.

    number k of a line  ->  bits [k b, (k + 1) b) of the line's stream, low bits first; word j is bits [32 j, 32 j + 32)

Numbers may lie across two words; the last word of a line is filled up with zeros. compressed-tensors takes a line
along the inputs, GPTQ along the rows of its transposed weight: the same stream, in another dimension.
"""

import torch
from torch import Tensor


def to_words(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers.

    Args:
        numbers: (n_lines, n) of any integer dtype, each in [0, 2**bits).
        bits: width of a number, 1 to 8.

    Returns:
        (n_lines, ceil(n * bits / 32)) int32.
    """
    shifts = torch.arange(bits, device=numbers.device)
    stream = (numbers.to(torch.int32)[..., None] >> shifts & 1).flatten(1)  # (n_lines, n * bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    places = torch.arange(32, device=numbers.device)
    words = (stream.long() << places).sum(2)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def from_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Unpack numbers.

    Args:
        words: (n_lines, at least ceil(n * bits / 32)) int32.
        bits: width of a number, 1 to 8.
        n: numbers in a line.

    Returns:
        (n_lines, n) uint8.
    """
    places = torch.arange(32, device=words.device)
    stream = (words[..., None] >> places & 1).flatten(1)[:, : n * bits].unflatten(1, (n, bits))
    shifts = torch.arange(bits, device=words.device)
    return (stream << shifts).sum(2).to(torch.uint8)
