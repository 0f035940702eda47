"""Perplexity of a language model, or of a vision-language model on text alone.

    ppl = exp( - 1/N sum_{rows, t} log p(token_{t+1} | token_1 .. token_t) )

over windows of equal length that share no context. Logits are scored in float32 whatever the model computes
in, one row at a time: at the peak the device holds the logits of a batch and (length, vocab_size) float32 of
one row.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def perplexity(
    model: PreTrainedModel, token_ids: Tensor, *, batch_size: int = 4, chunk: int | None = None
) -> float:
    """Exponential of the mean negative log-likelihood of the next token.

    Args:
        model: any model whose forward takes input_ids and returns logits.
        token_ids: (n_rows, length) integers; every row is a window without padding.
        batch_size: rows per forward.
        chunk: tokens of a row per forward, the others before them in the key-value cache; None takes the whole
            row at once. With batch_size * chunk small, the kernels that generate are those that are measured.

    Returns:
        The perplexity; infinite or NaN where the model's logits are.

    Raises:
        ValueError: the token ids have another shape, no second token, or lie outside the vocabulary.
    """
    if token_ids.ndim != 2 or token_ids.shape[0] == 0 or token_ids.shape[1] < 2:
        raise ValueError(f"token ids: expected (n_rows, length >= 2), got shape {tuple(token_ids.shape)}")
    vocab_size = model.config.get_text_config().vocab_size
    if int(token_ids.max()) >= vocab_size or int(token_ids.min()) < 0:
        found = f"{int(token_ids.min())} to {int(token_ids.max())}"
        raise ValueError(
            f"token ids: expected 0 to {vocab_size - 1}, got {found}: use the model's own tokenizer"
        )
    total = 0.0
    with torch.inference_mode():
        for rows in token_ids.split(batch_size):
            ids = rows.to(model.device)
            logits = _logits(model, ids, chunk)  # (batch_size, length, vocab_size)
            for row_logits, row_ids in zip(logits, ids, strict=True):
                total += float(next_token_nll(row_logits, row_ids).double().sum())
    mean = total / (token_ids.shape[0] * (token_ids.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def _logits(model: PreTrainedModel, ids: Tensor, chunk: int | None) -> Tensor:
    if chunk is None:
        return model(input_ids=ids, use_cache=False).logits
    parts, cache = [], None
    for part in ids.split(chunk, dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def next_token_nll(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first, given those before it.

    Args:
        logits: (n_tokens, vocab_size) of any floating dtype.
        token_ids: (n_tokens,).

    Returns:
        (n_tokens - 1,) float32, in nats.
    """
    return torch.nn.functional.cross_entropy(logits[:-1].float(), token_ids[1:], reduction="none")


def token_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, *, length: int = 512, n_windows: int | None = None
) -> Tensor:
    """Cut a text into windows of equal length, from its beginning; what is left over is dropped.

    Args:
        text: the text.
        tokenizer: the model's own.
        length: tokens per window.
        n_windows: take the first windows only; None takes all.

    Returns:
        (n_windows, length) int64.

    Raises:
        ValueError: the text has fewer tokens than are asked for, or no token of a window has one before it.
    """
    if length < 2 or (n_windows is not None and n_windows < 1):
        raise ValueError(
            f"expected windows of length 2 or more, at least 1, got length {length}, n_windows {n_windows}"
        )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    n_found = len(ids) // length
    if n_found < (n_windows or 1):
        asked = f"{n_windows or 1} windows of {length} tokens"
        raise ValueError(
            f"the text has {len(ids)} tokens, too few for {asked}: give more text or shorter windows"
        )
    n_taken = n_found if n_windows is None else n_windows
    return ids[: n_taken * length].reshape(n_taken, length)
