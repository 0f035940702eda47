"""The loss of a calibration batch whose gradients tell which tokens matter, for any kind of model.

* A model that predicts tokens: cross-entropy of the next token, summed over the answer tokens of a row (over its text
  tokens, if the calibration set or the row has no answer). An encoder-decoder with labels in the batch: its own loss.
* A dual encoder: symmetric cross-entropy of matching images to texts within the batch.
* A batch of one pair, or an encoder alone: a random projection <r, embedding>, r ~ N(0, 1). The mean of its squared
  gradient is that of the Gauss-Newton matrix of the squared embedding error. (The squared norm of an embedding is
  constant where embeddings are normalised, so it has no gradient.)

Targets come from the batch (empirical Fisher), or are sampled from the model's own distribution (true Fisher).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmq.calib.tokens import ANSWER, TEXT, CalibBatch
from vlmq.calib.trees import leaves

# From the log-probabilities (n, n_classes) and the targets of the data (n,) to the targets to use (n,).
Labels = Callable[[Tensor, Tensor], Tensor]


def data_labels(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """The targets of the data."""
    return targets


def model_labels(generator: torch.Generator) -> Labels:
    """Targets sampled from the model's distribution, with a generator on the CPU."""

    def sample(log_probabilities: Tensor, targets: Tensor) -> Tensor:
        cumulated = log_probabilities.detach().double().exp().cumsum(dim=-1)
        uniform = torch.rand(len(targets), 1, generator=generator, dtype=torch.float64).to(cumulated.device)
        sampled = torch.searchsorted(cumulated, uniform * cumulated[:, -1:]).squeeze(1)
        return sampled.clamp(max=log_probabilities.shape[-1] - 1)

    return sample


def reference_kind(batches: list[CalibBatch]) -> int:
    """ANSWER if any batch has answer tokens, else TEXT: the tokens whose prediction matters."""
    return ANSWER if any(bool((batch.kinds == ANSWER).any()) for batch in batches) else TEXT


def batch_loss(
    outputs: Any, batch: CalibBatch, reference: int, labels: Labels, generator: torch.Generator
) -> Tensor:
    """The loss of one batch, a scalar; see the module.

    Args:
        outputs: what the model returned.
        batch: what it was given.
        reference: from `reference_kind`.
        labels: `data_labels` or `model_labels(generator)`.
        generator: of random projections, on the CPU.
    """
    logits = _get(outputs, "logits")
    ids = batch.inputs.get("input_ids")
    if logits is not None and ids is not None and logits.shape[:-1] == ids.shape == batch.kinds.shape:
        return _next_token_loss(logits, ids, batch.kinds, reference, labels)
    own = _get(outputs, "loss")
    if own is not None:
        return own.float()
    pairs = _get(outputs, "logits_per_image")
    if pairs is not None and pairs.shape[0] == pairs.shape[1] > 1:
        return _cross_entropy(pairs, labels) + _cross_entropy(pairs.T, labels)
    return _projection(outputs, generator)


def _get(outputs: Any, key: str) -> Tensor | None:
    return outputs.get(key) if isinstance(outputs, Mapping) else getattr(outputs, key, None)


def _next_token_loss(logits: Tensor, ids: Tensor, kinds: Tensor, reference: int, labels: Labels) -> Tensor:
    """Summed cross-entropy of (rows, n_tokens, n_words) logits: token t predicts token t + 1."""
    kinds = kinds[:, 1:].to(logits.device)
    text = (kinds == TEXT) | (kinds == ANSWER)
    wanted = kinds == ANSWER if reference == ANSWER else text
    wanted = torch.where(wanted.any(dim=1, keepdim=True), wanted, text)
    log_probabilities = logits[:, :-1][wanted].float().log_softmax(dim=-1)
    targets = labels(log_probabilities, ids[:, 1:].to(logits.device)[wanted])
    return F.nll_loss(log_probabilities, targets, reduction="sum")


def _cross_entropy(pairs: Tensor, labels: Labels) -> Tensor:
    log_probabilities = pairs.float().log_softmax(dim=-1)
    targets = labels(log_probabilities, torch.arange(len(pairs), device=pairs.device))
    return F.nll_loss(log_probabilities, targets, reduction="sum")


def _projection(outputs: Any, generator: torch.Generator) -> Tensor:
    """Sum of <r, e> over the embeddings e, r standard normal."""
    for keys in (("image_embeds", "text_embeds"), ("pooler_output",), ("last_hidden_state",)):
        embeddings = [e for e in (_get(outputs, key) for key in keys) if e is not None]
        if embeddings:
            break
    else:
        embeddings = [
            leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ][:1]
    return torch.stack(
        [(e.float() * torch.randn(e.shape, generator=generator).to(e.device)).sum() for e in embeddings]
    ).sum()
