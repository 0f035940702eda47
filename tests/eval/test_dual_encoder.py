import math

import pytest
import torch
from tiny_models import build
from tiny_processors import build as build_processor
from tiny_processors import picture
from torch.nn import functional as F

from vlmq.eval import dual_encoder
from vlmq.eval.dual_encoder import (
    class_embeddings,
    embed_images,
    embed_texts,
    read_templates,
    retrieval,
    zero_shot,
)
from vlmq.eval.evaluation import evaluate
from vlmq.eval.labeled import CaptionedImages, LabeledImages

PICTURES = tuple(picture(i) for i in range(7))
CLASSES = ("red", "circle", "what", "color", "shape", "is", "the")


@pytest.fixture(scope="module", params=["clip", "siglip"])
def dual(request):
    return build(request.param), build_processor(request.param)


def test_embeddings_are_those_of_the_models_forward(dual):
    model, processor = dual
    texts = ["a red circle", "what is the shape"]
    inputs = processor(
        text=texts,
        images=list(PICTURES[:2]),
        return_tensors="pt",
        **dual_encoder.caption_options(processor.tokenizer, 99),
    )
    with torch.inference_mode():
        outputs = model(**inputs)
    torch.testing.assert_close(
        embed_images(model, processor, PICTURES[:2]), F.normalize(outputs.image_embeds)
    )
    torch.testing.assert_close(embed_texts(model, processor, texts), F.normalize(outputs.text_embeds))


def test_class_embeddings_average_the_normalised_templates(dual):
    model, processor = dual
    found = class_embeddings(model, processor, ["circle", "shape"], ["a photo of a {}", "the {}"])
    parts = embed_texts(
        model, processor, ["a photo of a circle", "the circle", "a photo of a shape", "the shape"]
    )
    torch.testing.assert_close(found, F.normalize(parts.view(2, 2, -1).mean(dim=1)))


@pytest.fixture
def made_up(monkeypatch):
    """Embeddings of one's own: unit vectors, image i and text "i" alike."""

    def embed(model, processor, items, *, batch_size=0):
        places = [int(str(item).split()[-1]) for item in items]
        nearness = torch.tensor([0.9 if "x" in str(item) else 1.0 for item in items])
        return nearness[:, None] * torch.eye(12)[places] + 0.01 * torch.arange(12.0)

    monkeypatch.setattr(dual_encoder, "embed_images", embed)
    monkeypatch.setattr(dual_encoder, "embed_texts", embed)


def test_zero_shot_counts_top1_top5_and_per_class(made_up):
    classes = tuple(str(i) for i in range(8))
    # Four images of class 0 are seen as 0; one of class 1 as 0 too; one of class 2 as class 11, whom nothing is like.
    images: tuple = (0, 0, 0, 0, 0, 11)
    data = LabeledImages(images, (0, 0, 0, 0, 1, 2), classes)
    found = zero_shot(None, None, data, templates=["a {}"])
    assert found.top1 == pytest.approx(4 / 6)
    # Ties of what is left are broken by the last classes, 4 to 7: neither 1 nor 2 is among the first five.
    assert found.top5 == pytest.approx(4 / 6)
    assert found.mean_per_class == pytest.approx(1 / 3)


def test_retrieval_takes_any_caption_of_an_image_and_any_image_of_a_caption(made_up):
    images: tuple = tuple(range(12))
    captions = [(str(i), f"x {(i + 1) % 12}") for i in range(11)] + [("x 0",)]
    found = retrieval(None, None, CaptionedImages(images, tuple(captions)))
    assert found.n_texts == 11 + 12
    # Text "x j" shows image j but belongs to image j - 1: only the texts "i" find their image first.
    assert found.text_to_image[1] == pytest.approx(11 / 23)
    assert found.image_to_text[1] == pytest.approx(11 / 12)
    assert found.text_to_image[10] >= found.text_to_image[5] >= found.text_to_image[1]


def test_recall_without_more_candidates_than_ranks_is_no_number(dual):
    model, processor = dual
    data = CaptionedImages(PICTURES, tuple((f"shape {name}",) for name in CLASSES))
    found = retrieval(model, processor, data)
    assert math.isnan(found.text_to_image[10])
    assert 0 <= found.text_to_image[1] <= found.text_to_image[5] <= 1


def test_evaluate_shows_both_beside_the_original(dual):
    model, processor = dual
    table = evaluate(
        model,
        processor,
        labeled=LabeledImages(PICTURES, tuple(range(7)), CLASSES),
        templates=read_templates(["simple"]),
        captioned=CaptionedImages(PICTURES, tuple((name,) for name in CLASSES)),
        original=model,
    )
    keys = [column.key for column in table.columns]
    assert {"zero_shot_top1", "zero_shot_top5", "text_to_image_1", "image_to_text_5"} <= set(keys)
    first, second = (dict(zip(keys, row, strict=True)) for row in table.rows)
    assert first.pop("model") != second.pop("model")
    assert str(first) == str(second)


def test_read_templates():
    assert read_templates(["photo", "the {}!"]) == ("a photo of a {}", "the {}!")
    with pytest.raises(ValueError, match=r"template 'a photo': expected one \{\}.*photo simple"):
        read_templates(["a photo"])
    with pytest.raises(ValueError, match="no template"):
        read_templates([])


def test_a_model_that_is_no_dual_encoder_is_refused():
    data = LabeledImages(PICTURES, tuple(range(7)), CLASSES)
    with pytest.raises(ValueError, match="need a dual encoder such as CLIP or SigLIP, got Llava"):
        evaluate(build("llava"), build_processor("llava"), labeled=data)
