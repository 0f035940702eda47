"""Dual encoders: zero-shot classification with prompt templates, and image-text retrieval.

Zero-shot, as CLIP, open_clip and clip-benchmark do it: the embedding of a class is the mean over the templates of the
normalised embeddings of "a photo of a {class}", normalised again; an image is of the class whose embedding has the
largest cosine.

    w_c = norm( mean_t norm( text(t(c)) ) )        class of x = argmax_c < norm(image(x)), w_c >

Retrieval: of each text, whether its image is among the k nearest images (text to image); of each image, whether one of
its captions is among the k nearest texts (image to text). Texts that occur with several images are right for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from vlmq.calib.encode import caption_options
from vlmq.eval.agreement import inputs_for
from vlmq.eval.labeled import CaptionedImages, LabeledImages

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}",),
    # The seven of the CLIP paper's notebook, which open_clip calls "simple".
    "simple": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
RANKS = (1, 5, 10)


@dataclass(frozen=True)
class ZeroShot:
    """Shares of 1: top-1, top-5 (NaN with five classes or fewer), and the mean over classes of top-1."""

    top1: float
    top5: float
    mean_per_class: float
    n_images: int


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5 and 10, shares of 1; NaN where there are not more candidates than that."""

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    n_images: int
    n_texts: int


def is_dual(model: PreTrainedModel) -> bool:
    """Whether a model embeds images and texts apart."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Templates by name of a set, or as texts with {} for the class.

    Raises:
        ValueError: a text without {}, or no template at all.
    """
    templates: list[str] = []
    for text in given:
        if text not in TEMPLATE_SETS and text.count("{}") != 1:
            known = " ".join(TEMPLATE_SETS)
            raise ValueError(f"template {text!r}: expected one {{}} for the class, or a known set ({known})")
        templates += TEMPLATE_SETS.get(text, (text,))
    if not templates:
        raise ValueError("no template: give at least one, such as 'a photo of a {}'")
    return tuple(templates)


@torch.inference_mode()
def embed_images(
    model: PreTrainedModel, processor: Any, images: Sequence[Image.Image], *, batch_size: int = 64
) -> Tensor:
    """Normalised embeddings (n_images, n_dims) float32 on the CPU."""
    check_dual(model)
    parts = []
    for chunk in _chunks(images, batch_size):
        inputs = dict(processor.image_processor(list(chunk), return_tensors="pt"))
        features: Any = model.get_image_features(**inputs_for(model, inputs))
        parts.append(_normalised(features))
    return torch.cat(parts)


@torch.inference_mode()
def embed_texts(
    model: PreTrainedModel, processor: Any, texts: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """Normalised embeddings (n_texts, n_dims) float32 on the CPU."""
    check_dual(model)
    tokenizer, parts = processor.tokenizer, []
    options = caption_options(tokenizer, 2048)
    for chunk in _chunks(texts, batch_size):
        inputs = dict(tokenizer(list(chunk), return_tensors="pt", **options))
        features: Any = model.get_text_features(**inputs_for(model, inputs))
        parts.append(_normalised(features))
    return torch.cat(parts)


def class_embeddings(
    model: PreTrainedModel, processor: Any, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """The embedding of each class, (n_classes, n_dims) float32."""
    texts = [template.replace("{}", name) for name in classes for template in templates]
    embedded = embed_texts(model, processor, texts)
    return F.normalize(embedded.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def zero_shot(
    model: PreTrainedModel,
    processor: Any,
    data: LabeledImages,
    *,
    templates: Sequence[str] = TEMPLATE_SETS["photo"],
    batch_size: int = 64,
) -> ZeroShot:
    """Classify images by the nearest class embedding.

    Raises:
        ValueError: the model is no dual encoder.
    """
    weights = class_embeddings(model, processor, data.classes, templates)
    scores = embed_images(model, processor, data.images, batch_size=batch_size) @ weights.T
    labels = torch.tensor(data.labels)
    is_right = scores.argmax(dim=-1) == labels
    top5 = float("nan")
    if len(data.classes) > 5:
        top5 = float((scores.topk(5).indices == labels[:, None]).any(dim=-1).double().mean())
    per_class = [is_right[labels == c].double().mean() for c in labels.unique()]
    return ZeroShot(
        float(is_right.double().mean()), top5, float(torch.stack(per_class).mean()), len(data.images)
    )


def retrieval(
    model: PreTrainedModel, processor: Any, data: CaptionedImages, *, batch_size: int = 64
) -> Retrieval:
    """Find images by their captions and captions by their images.

    Raises:
        ValueError: the model is no dual encoder.
    """
    texts = sorted({text for captions in data.captions for text in captions})
    places = {text: place for place, text in enumerate(texts)}
    belongs = torch.zeros(len(data.images), len(texts), dtype=torch.bool)
    for i, captions in enumerate(data.captions):
        belongs[i, [places[text] for text in captions]] = True
    images = embed_images(model, processor, data.images, batch_size=batch_size)
    scores = images @ embed_texts(model, processor, texts).T
    return Retrieval(
        {k: _recall(scores.T, belongs.T, k) for k in RANKS},
        {k: _recall(scores, belongs, k) for k in RANKS},
        len(data.images),
        len(texts),
    )


def check_dual(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model embeds images and texts apart."""
    if not is_dual(model):
        raise ValueError(
            f"zero-shot classification and retrieval need a dual encoder such as CLIP or SigLIP, "
            f"got {type(model).__name__}"
        )


def _recall(scores: Tensor, belongs: Tensor, k: int) -> float:
    """Share of the rows with a right column among the k of the highest scores."""
    if scores.shape[1] <= k:
        return float("nan")
    return float(belongs.gather(1, scores.topk(k, dim=1).indices).any(dim=1).double().mean())


def _normalised(features: Any) -> Tensor:
    pooled = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(pooled.float(), dim=-1).cpu()


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
