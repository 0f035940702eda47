"""Which tokens the assistant says.

Turn k of the assistant is what the chat up to turn k has beyond the chat before it with the assistant's turn
opened:

    answer_k = [ |common prefix of ids(chat[:k], opened) and ids(chat)|, |same of ids(chat[:k+1])| )

Images cannot stand in an answer, so the positions are first measured from the end, on the text alone, where
an image is one token. Only if those last tokens differ from the real ones, because an image follows, the
shortened chat goes through the processor with its images.

A template with generation tags says more exactly what counts (not the newline after a closed turn, for one).
Its mask is taken if it agrees with the turns found: transformers before 5.23 misplaces it behind an image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmq.calib.messages import Message


def answer_mask(
    messages: Sequence[Message],
    ids: Sequence[int],
    tagged: Tensor | None,
    *,
    render: Callable[[Sequence[Message], bool], str],
    tokenize: Callable[[str], list[int]],
    encode: Callable[[Sequence[Message], bool], list[int]],
) -> Tensor:
    """Mark the assistant's tokens, with what closes a turn.

    Args:
        messages: the chat.
        ids: its token ids, images expanded.
        tagged: (n_tokens,) bool, what the template's generation tags mark, or None without tags.
        render: a chat, and whether the assistant's turn is opened at its end, to text.
        tokenize: text to token ids, without special tokens of the tokenizer's own.
        encode: like render, to token ids with images expanded.

    Returns:
        (n_tokens,) bool.
    """
    text_ids = tokenize(render(messages, False))

    def n_after(n_messages: int, open_answer: bool) -> int:
        """How many tokens follow the first messages."""
        if n_messages == 0:
            return len(ids)
        part = tokenize(render(messages[:n_messages], open_answer))
        n_tail = len(text_ids) - n_common(part, text_ids)
        if n_tail <= len(ids) and list(ids[len(ids) - n_tail :]) == text_ids[len(text_ids) - n_tail :]:
            return n_tail
        return len(ids) - n_common(encode(messages[:n_messages], open_answer), ids)

    mask = torch.zeros(len(ids), dtype=torch.bool)
    agrees = True
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(ids) - n_after(k, True)
            end = len(ids) - (0 if k + 1 == len(messages) else n_after(k + 1, False))
            mask[start:end] = True
            agrees = agrees and tagged is not None and bool(tagged[start:end].any())
    return tagged if tagged is not None and agrees and not (tagged & ~mask).any() else mask


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
