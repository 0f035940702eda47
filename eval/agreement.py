"""How far a quantized model's next-token distribution is from the original's.

    KL   = mean_t sum_v p(v | t) log( p(v | t) / q(v | t) )        p original, q quantized
    top1 = mean_t [ argmax p(. | t) = argmax q(. | t) ]

over the positions t whose next token is text or answer: what a model would say after an image token is never
asked. Dual encoders have no next token; there a position is an image of a batch, and the distribution is the
softmax of its similarity to the batch's texts. Everything is computed in float32, row by row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.calib.batches import as_batches
from vlmq.calib.tokens import ANSWER, TEXT, CalibBatch


@dataclass(frozen=True)
class Agreement:
    """`kl` in nats per position, `top1` a share of 1; a position is a token, or an image of a dual encoder."""

    kl: float
    top1: float
    n_positions: int


def agreement(
    model: PreTrainedModel,
    original: PreTrainedModel,
    batches: Any,
    *,
    kinds: tuple[int, ...] = (TEXT, ANSWER),
) -> Agreement:
    """Compare the two models' predictions on the same inputs.

    Args:
        model: the quantized model.
        original: the model before quantization; it may lie on another device.
        batches: what `vlmq.calib.load` returns, or ready batches, or token ids.
        kinds: kinds of the tokens whose prediction is compared; `(ANSWER,)` compares answers only.

    Raises:
        ValueError: no batch has a token of these kinds, or the two models' outputs differ in shape.
    """
    divergence, n_same, n_positions = 0.0, 0, 0
    for batch in as_batches(batches, original):
        for p, q in _paired_rows(model, original, batch, kinds):
            if p.shape != q.shape:
                shapes = f"{tuple(q.shape)} against {tuple(p.shape)}"
                raise ValueError(f"the models are not of one kind: logits {shapes} of the original")
            divergence += float(kl_divergence(p, q).double().sum())
            n_same += int((p.argmax(-1) == q.argmax(-1)).sum())
            n_positions += len(p)
    if n_positions == 0:
        raise ValueError(f"no batch has a token of the kinds {kinds} after its first: nothing to compare")
    return Agreement(divergence / n_positions, n_same / n_positions, n_positions)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each row.

    Args:
        p_logits, q_logits: (n_positions, n_choices).

    Returns:
        (n_positions,) float32, in nats, at least 0 up to rounding.
    """
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _paired_rows(
    model: PreTrainedModel, original: PreTrainedModel, batch: CalibBatch, kinds: tuple[int, ...]
) -> Iterable[tuple[Tensor, Tensor]]:
    """Per sample, the compared logits of the original and of the model, (n_positions, n_choices) each."""
    p_logits, q_logits = forward_logits(original, batch.inputs), forward_logits(model, batch.inputs)
    if p_logits.ndim == 2:
        yield p_logits, q_logits.to(p_logits.device)
        return
    wanted = torch.isin(batch.kinds[:, 1:], torch.tensor(kinds, dtype=batch.kinds.dtype))
    wanted &= batch.kinds[:, :-1] != 0
    for p, q, places in zip(p_logits, q_logits, wanted.to(p_logits.device), strict=True):
        yield p[:-1][places], q.to(p.device)[:-1][places]


@torch.inference_mode()
def forward_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of one forward: (rows, n_tokens, vocab_size), or (n_images, n_texts) of a dual encoder.

    Args:
        model: on any device; floating inputs are cast to its dtype.
        inputs: keyword arguments of its forward.
    """
    outputs = model(**inputs_for(model, inputs), **({} if _is_dual(model) else {"use_cache": False}))
    return outputs.logits_per_image if _is_dual(model) else outputs.logits


def inputs_for(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs on the model's device, floating tensors in its dtype."""
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        moved[name] = value
    return moved


def _is_dual(model: PreTrainedModel) -> bool:
    return hasattr(model, "get_image_features") and model.get_output_embeddings() is None
