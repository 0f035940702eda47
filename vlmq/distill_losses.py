"""What distillation minimises, by kind of model: student (the quantized model) against teacher (the original).

Dual encoders, embeddings normalised, a the anchors of the student, b the embeddings of the teacher, t the teacher's
logit scale (CLIP-KD, arXiv 2307.12732; TernaryCLIP, arXiv 2510.21879):

    contrastive   CE(t <a_image, b_text>, pairs) + CE(t <a_text, b_image>, pairs)       "interactive"
    feature       sum over both sides of ||a - b||^2
    logits        KL(teacher's || student's distribution over texts) + the same over images

Pairs whose texts are equal are right for each other. Models that predict tokens, over the positions n that predict an
answer token (any text token where the data holds no answers), p the teacher's distribution, w saliency of mean 1:

    forward_kl    sum_n w_n KL(p_n || q_n) / sum_n w_n
    reverse_kl    sum_n w_n KL(q_n || p_n) / sum_n w_n
    feature       ||h_student - h_teacher||^2 / ||h_teacher||^2 of the last hidden states of all tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from vlmq.calib.tokens import ANSWER, PADDING, TEXT

DUAL_LOSSES = {"contrastive": 0.1, "feature": 1.0, "logits": 1.0}
TOKEN_LOSSES = {"forward_kl": 1.0, "reverse_kl": 1.0, "feature": 0.1}


@dataclass(frozen=True)
class Example:
    """One batch of training: model inputs, kinds of its tokens, and a weight per token, (rows, n_tokens), or None."""

    inputs: dict[str, Any]
    kinds: Tensor
    weights: Tensor | None = None


def is_dual(model: PreTrainedModel) -> bool:
    """Whether a model embeds images and texts apart."""
    return hasattr(model, "get_image_features") and model.get_output_embeddings() is None


def known_losses(model: PreTrainedModel) -> dict[str, float]:
    """The losses of this kind of model with their default weights."""
    return DUAL_LOSSES if is_dual(model) else TOKEN_LOSSES


def read_losses(model: PreTrainedModel, given: Mapping[str, float] | None) -> dict[str, float]:
    """Weights of the losses by name; those that are not given count 0, None takes the default.

    Raises:
        ValueError: an unknown name, a negative weight, or no weight above 0.
    """
    known = known_losses(model)
    if given is None:
        return dict(known)
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"loss {unknown[0]!r} is unknown for {type(model).__name__}; known: {' '.join(known)}"
        )
    if min(given.values(), default=0) < 0 or max(given.values(), default=0) <= 0:
        raise ValueError(f"weights of losses must not be below 0, and one above it, got {dict(given)}")
    return {name: float(weight) for name, weight in given.items() if weight > 0}


def forward(model: torch.nn.Module, example: Example, *, is_dual_encoder: bool, with_hidden: bool) -> Any:
    """The outputs of a model for an example."""
    options: dict[str, Any] = (
        {} if is_dual_encoder else {"use_cache": False, "output_hidden_states": with_hidden}
    )
    return model(**example.inputs, **options)


def dual_losses(student: Any, teacher: Any, example: Example) -> dict[str, Tensor]:
    """The losses of a dual encoder, each a scalar."""
    a_image, a_text = (F.normalize(e.float(), dim=-1) for e in (student.image_embeds, student.text_embeds))
    b_image, b_text = (F.normalize(e.float(), dim=-1) for e in (teacher.image_embeds, teacher.text_embeds))
    scores = teacher.logits_per_image.float()
    cosines = b_image @ b_text.T
    # The slope of the teacher's logits over its cosines is its logit scale, whatever a model calls it.
    centred = cosines - cosines.mean()
    scale = ((scores * centred).sum() / centred.square().sum().clamp(min=1e-12)).clamp(1, 100)
    ids = example.inputs["input_ids"]
    same = (ids[:, None] == ids[None, :]).all(dim=-1).float()
    pairs = same / same.sum(dim=1, keepdim=True)
    own = student.logits_per_image.float()
    return {
        "contrastive": F.cross_entropy(scale * a_image @ b_text.T, pairs)
        + F.cross_entropy(scale * a_text @ b_image.T, pairs),
        "feature": (a_image - b_image).square().sum(-1).mean() + (a_text - b_text).square().sum(-1).mean(),
        "logits": _kl(scores, own).mean() + _kl(scores.T, own.T).mean(),
    }


def token_losses(student: Any, teacher: Any, example: Example) -> dict[str, Tensor]:
    """The losses of a model that predicts tokens, each a scalar."""
    wanted = predicted_places(example.kinds)
    q, p = student.logits[:, :-1][wanted], teacher.logits[:, :-1][wanted]
    weights = (
        torch.ones(len(q), device=q.device) if example.weights is None else example.weights[:, :-1][wanted]
    )
    weights = weights / weights.sum()
    losses = {
        "forward_kl": (weights * _kl(p, q)).sum(),
        "reverse_kl": (weights * _kl(q, p)).sum(),
    }
    if getattr(student, "hidden_states", None) is not None:
        h, target = student.hidden_states[-1].float(), teacher.hidden_states[-1].float()
        valid = (example.kinds != PADDING)[..., None]
        lost = ((h - target) * valid).square().sum()
        losses["feature"] = lost / (target * valid).square().sum()
    return losses


def predicted_places(kinds: Tensor) -> Tensor:
    """Positions whose prediction counts: (rows, n_tokens - 1) bool, those before an answer (or, without, text)."""
    after = kinds[:, 1:]
    answers = after == ANSWER
    if bool(answers.any()):
        return answers
    return (after == TEXT) & (kinds[:, :-1] != PADDING)


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each row of logits."""
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
