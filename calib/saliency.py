"""Token saliency: how much the squared error of each token counts, behind one signature.

A saliency maps a block to one weight per token and linear layer, s_n >= 0, the coefficient of the *squared* error of
token n: the layer then minimises sum_n s_n ||(What - W) x_n||^2, that is H = U diag(s) U^T. A factor g that stands
inside the norm, as in VLMQ (arXiv 2508.03351), enters as s = g^2.

Raw scores of every kind go through one post-processing, per sample: padding is masked, scores are clipped at a high
quantile of the valid tokens, raised to a power, optionally averaged within each kind of token, raised to a floor,
scaled to mean 1, and optionally drawn towards 1 by a temperature t: s <- (1 - t) + t s.

Use: `context = prepare(name, model, layout, batches)` once on the full-precision model, then
`SALIENCIES[name](block, context)` for each block. A saliency of one's own is any function of that signature.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.calib.block import Block
from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch
from vlmq.families import Layout
from vlmq.options import check_types
from vlmq.registry import Registry

SALIENCIES = Registry(
    "saliency",
    {
        "uniform": "vlmq.calib.saliency_static:uniform",
        "block_grad": "vlmq.calib.saliency_gradient:block_grad",
        "modality": "vlmq.calib.saliency_gradient:modality",
        "act_norm": "vlmq.calib.saliency_static:act_norm",
        "redundancy": "vlmq.calib.saliency_static:redundancy",
        "attn_received": "vlmq.calib.saliency_attention:attn_received",
        "loss_grad": "vlmq.calib.saliency_gradient:loss_grad",
    },
)
NEED_LOSS = ("loss_grad", "modality")
LABELS = ("data", "model")


@dataclass(frozen=True)
class PostProcess:
    """The shared post-processing, see `postprocess`; clip None is what suits the saliency (0.99, or 1 for ratios)."""

    clip: float | None = None
    floor: float = 0.05
    power: float = 1.0
    temperature: float = 1.0
    average_kinds: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: an option is out of its range.
        """
        clip = 1.0 if self.clip is None else self.clip
        _check_ranges(clip, self.floor, self.power, self.temperature, "post-processing of the saliency")


@dataclass(frozen=True)
class SaliencyContext:
    """What a saliency may need beyond the block; made by `prepare`.

    Attributes:
        loss_weights: per full layer name, per batch, (n_tokens,) float32: mean_c (dLoss/dZ_nc)^2 at the layer's output,
            in a scale of its own in each batch. None unless the saliency asks for it.
        image_ratios: per full layer name, the weight of an image token relative to a text token (modality). None
            unless the saliency asks for it.
        post: the post-processing.
    """

    loss_weights: dict[str, list[Tensor]] | None = None
    image_ratios: dict[str, float] | None = None
    post: PostProcess = field(default_factory=PostProcess)


Saliency = Callable[[Block, SaliencyContext], dict[str, list[Tensor]]]


def read_options(name: str, options: Mapping[str, Any] | None) -> tuple[str, PostProcess]:
    """Check the options of a saliency: those of the post-processing, and `labels` where it differentiates the loss.

    `uniform` has none: whatever they are, its weights stay equal.

    Args:
        name: an entry of SALIENCIES.
        options: name -> value, such as {"temperature": 0.5, "labels": "model"}; None is none.

    Returns:
        `labels` and `post`, as `prepare` takes them.

    Raises:
        ValueError: an unknown name, an option that the saliency does not take or that is out of its range.
        TypeError: an option of the wrong type.
    """
    _check_name(name)
    declared: dict[str, Any] = {} if name == "uniform" else get_type_hints(PostProcess)
    if name in NEED_LOSS:
        declared["labels"] = str
    given = check_types(options or {}, declared, f"saliency {name!r}")
    labels = given.pop("labels", LABELS[0])
    _check_labels(name, labels)
    return labels, PostProcess(**given)


def prepare(
    name: str,
    model: PreTrainedModel,
    layout: Layout,
    batches: list[CalibBatch],
    *,
    labels: str = "data",
    seed: int = 0,
    post: PostProcess | None = None,
) -> SaliencyContext:
    """Compute what `name` needs from the whole full-precision model, once, before the blocks are walked.

    Only loss_grad and modality do work here: one forward and one backward pass per batch, without weight gradients.

    Args:
        name: an entry of SALIENCIES.
        model: the full-precision model; it is left as it was.
        layout: its blocks.
        batches: the batches that will be walked, in the same order.
        labels: "data" takes the targets of the loss from the batch (empirical Fisher), "model" samples them from the
            model's own distribution (true Fisher).
        seed: of the sampled targets and of the random projections of encoders without a loss.
        post: the post-processing; None is the default one.

    Raises:
        ValueError: unknown name, unknown `labels`.
        RuntimeError: the gradient of a layer is not finite.
    """
    _check_name(name)
    _check_labels(name, labels)
    post = post or PostProcess()
    if name not in NEED_LOSS:
        return SaliencyContext(post=post)
    from vlmq.calib.loss_gradient import image_ratios, loss_weights

    if name == "loss_grad":
        return SaliencyContext(
            loss_weights=loss_weights(model, layout, batches, labels=labels, seed=seed), post=post
        )
    return SaliencyContext(
        image_ratios=image_ratios(model, layout, batches, labels=labels, seed=seed), post=post
    )


def postprocess(
    raw: Tensor,
    kinds: Tensor,
    *,
    clip: float = 0.99,
    floor: float = 0.05,
    power: float = 1.0,
    temperature: float = 1.0,
    average_kinds: bool = False,
    where: str = "saliency",
) -> Tensor:
    """Turn raw scores into weights: padding 0, mean 1 over the valid tokens of each row.

    A row whose scores are all equal or all zero becomes uniform. The result does not depend on the scale of `raw`.

    Args:
        raw: (rows, n_tokens) or (n_tokens,) scores >= 0; those of padding are ignored.
        kinds: int8 of the same shape (PADDING, TEXT, IMAGE, ANSWER).
        clip: quantile of the row's valid scores at which they are clipped; 1 does not clip.
        floor: lowest weight as a share of the mean weight.
        power: exponent of the scores, above 0.
        temperature: 1 keeps the weights, 0 makes them uniform.
        average_kinds: give all tokens of one kind in a row their mean.
        where: what the scores belong to, for the message.

    Returns:
        float32 of the shape of `raw`.

    Raises:
        ValueError: shapes differ, or an option is out of its range.
        RuntimeError: a valid score is negative, NaN or infinite.
    """
    if raw.shape != kinds.shape:
        raise ValueError(
            f"{where}: scores {tuple(raw.shape)} and kinds {tuple(kinds.shape)} must have one shape"
        )
    _check_ranges(clip, floor, power, temperature, where)
    if raw.numel() == 0:
        return raw.float()
    kinds = torch.atleast_2d(kinds).to(raw.device)
    valid = kinds != PADDING
    scores = torch.where(valid, torch.atleast_2d(raw).double(), 0.0)
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
        bad = (~torch.isfinite(scores) | (scores < 0)).nonzero()[0].tolist()
        raise RuntimeError(
            f"{where}: expected finite scores >= 0, got {scores[tuple(bad)].item()} at row {bad[0]}, token {bad[1]}; "
            "look for NaN in the inputs, or choose saliency 'uniform'"
        )
    n_valid = valid.sum(dim=1, keepdim=True)
    scores = _scaled(scores)
    scores = _scaled(torch.minimum(scores, _row_quantile(scores, valid, clip))) ** power
    scores = torch.where(scores.sum(dim=1, keepdim=True) > 0, scores, valid.double())
    if average_kinds:
        for kind in (TEXT, IMAGE, ANSWER):
            members = kinds == kind
            mean = (scores * members).sum(dim=1, keepdim=True) / members.sum(dim=1, keepdim=True).clamp(min=1)
            scores = torch.where(members, mean, scores)
    mean = scores.sum(dim=1, keepdim=True) / n_valid.clamp(min=1)
    scores = torch.where(valid, torch.maximum(scores, floor * mean), 0.0)
    scores = scores * n_valid / scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    scores = torch.where(valid, (1 - temperature) + temperature * scores, 0.0)
    return scores.reshape(raw.shape).float()


def _check_name(name: str) -> None:
    if name not in SALIENCIES:
        raise ValueError(f"saliency {name!r} is unknown; known: {' '.join(SALIENCIES)}")


def _check_labels(name: str, labels: str) -> None:
    if labels not in LABELS:
        raise ValueError(f"labels of saliency {name!r} must be 'data' or 'model', got {labels!r}")


def _check_ranges(clip: float, floor: float, power: float, temperature: float, where: str) -> None:
    if not (0 < clip <= 1 and 0 <= floor < 1 and power > 0 and 0 <= temperature <= 1):
        raise ValueError(
            f"{where}: expected 0 < clip <= 1, 0 <= floor < 1, power > 0 and 0 <= temperature <= 1, "
            f"got clip {clip}, floor {floor}, power {power}, temperature {temperature}"
        )


def _scaled(scores: Tensor) -> Tensor:
    """Each row divided by its largest score, so that powers neither overflow nor vanish."""
    peak = scores.amax(dim=1, keepdim=True)
    return torch.where(peak > 0, scores / peak.clamp(min=torch.finfo(scores.dtype).tiny), 0.0)


def _row_quantile(scores: Tensor, valid: Tensor, quantile: float) -> Tensor:
    """The quantile of each row's valid scores, linearly interpolated, (rows, 1)."""
    ordered = torch.where(valid, scores, torch.inf).sort(dim=1).values
    position = quantile * (valid.sum(dim=1, keepdim=True) - 1).clamp(min=0).double()
    low = ordered.gather(1, position.floor().long())
    high = ordered.gather(1, position.ceil().long())
    return torch.where(torch.isfinite(high), torch.lerp(low, high, position - position.floor()), 0.0)


def effective_tokens(weights: Iterable[Tensor]) -> float:
    """The effective sample size (sum s)^2 / sum s^2 over all batches: n_tokens if the weights are uniform."""
    total = square = 0.0
    for weight in weights:
        total += float(weight.double().sum())
        square += float(weight.double().square().sum())
    return total**2 / square if square > 0 else 0.0
