import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from vlmq.eval.clip_model import build_processor
from vlmq.eval.dual_encoder import retrieval, zero_shot
from vlmq.eval.scenes import (
    KINDS,
    Claim,
    Part,
    Placed,
    Scene,
    compose,
    cut_out,
    kind_of_picture,
    random_claim,
)
from vlmq.eval.scenes_data import (
    as_labeled,
    load_shipped_pictures,
    pairs,
    scenes_of_two,
    small_clip_path,
    write_kinds,
)
from vlmq.eval.train_clip import all_words, contrastive_loss, draw, targets


@pytest.fixture(scope="module")
def pictures():
    return load_shipped_pictures("test")


def scene(*things: Placed) -> Scene:
    return Scene(np.zeros((64, 64, 3), dtype=np.uint8), things)


RED = Placed("red", "circle", 2, 40, 12, 12)
BLUE = Placed("blue", "triangle", 30, 5, 30, 25)


@pytest.mark.parametrize(
    ("claim", "is_true"),
    [
        (Claim(Part("red", "circle")), True),
        (Claim(Part("red", "triangle")), False),
        (Claim(Part("red", "circle", "small", "left")), True),
        (Claim(Part("red", "circle", "large")), False),
        (Claim(Part("blue", "triangle", None, "right")), False),
        (Claim(Part("blue", "triangle", "large", "top")), True),
        (Claim(Part("red", "circle"), Part("blue", "triangle")), True),
        (Claim(Part("red", "circle"), Part("red", "circle")), False),
        (Claim(Part("red", "circle"), Part("blue", "triangle"), "bottom"), True),
        (Claim(Part("blue", "triangle"), Part("red", "circle"), "bottom"), False),
        (Claim(Part("blue", "triangle"), Part("red", "circle"), "right"), True),
    ],
)
def test_a_claim_holds_of_what_it_says(claim, is_true):
    assert claim.holds(scene(RED, BLUE)) is is_true


def test_captions_say_what_is_claimed():
    assert (
        Claim(Part("red", "circle", "small", "left")).text("a photo of ")
        == "a photo of a small red circle on the left"
    )
    assert (
        Claim(Part("red", "circle"), Part("blue", "triangle"), "top").text()
        == "a red circle above a blue triangle"
    )


def test_composed_scenes_hold_their_things_apart_and_random_claims_are_true(pictures):
    generator = random.Random(0)
    things = [p.thing for p in pictures if not p.thing.is_cut]
    for _ in range(60):
        made = compose(generator.sample(things, 2), generator)
        first, second = made.things
        assert first.relations(second)
        for is_full in (False, True):
            assert random_claim(made, generator, is_full=is_full).holds(made)
        ground = made.pixels[0, 0] if first.left and second.left else None
        for thing in made.things if ground is not None else ():
            box = made.pixels[thing.top : thing.top + thing.height, thing.left : thing.left + thing.width]
            assert (box != ground).any()


def test_a_cut_out_is_the_shape_and_a_color_that_is_not_known_is_refused():
    pixels = np.full((64, 64, 3), 240, dtype=np.uint8)
    pixels[10:20, 30:50] = (0, 128, 128)
    thing, found = cut_out(Image.fromarray(pixels), "rectangle")
    assert thing.mask.all()
    assert found.things == (Placed("teal", "rectangle", 30, 10, 20, 10),)
    pixels[10:20, 30:50] = (1, 2, 3)
    with pytest.raises(ValueError, match="the shape has the color"):
        cut_out(Image.fromarray(pixels), "rectangle")


def test_questions_tell_the_kind_or_leave_it_open():
    assert kind_of_picture([("what shape is in the image?", "circle")]) == "circle"
    assert kind_of_picture([("is there a triangle?", "no"), ("is there not a circle?", "yes")]) == "rectangle"
    assert kind_of_picture([("is there a triangle?", "no"), ("what color is the shape?", "red")]) is None


def test_the_loss_is_least_where_the_true_pairs_score_highest(pictures):
    generator = random.Random(3)
    scenes = [p.scene for p in pictures]
    drawn, claims = draw(scenes, [p.thing for p in pictures], generator, 24)
    truth = targets(drawn, claims)
    assert bool(truth[:, :24].diagonal().all())
    assert len(claims) > 24
    good, bad = contrastive_loss(20 * truth, truth), contrastive_loss(20 * (1 - truth), truth)
    assert float(good) < float(contrastive_loss(torch.zeros_like(truth), truth)) < float(bad)


def test_shipped_kinds_are_those_of_the_package(tmp_path, pictures):
    pytest.importorskip("easy_vqa")
    write_kinds(tmp_path / "kinds.json")
    shipped = small_clip_path().parent / "shapes-data" / "kinds.json"
    assert (tmp_path / "kinds.json").read_text() == shipped.read_text()
    assert len(pictures) > 480
    assert {p.thing.kind for p in pictures} == set(KINDS)


def test_the_shipped_clip_tells_shapes_and_finds_scenes(pictures):
    model = AutoModel.from_pretrained(small_clip_path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(small_clip_path())
    assert zero_shot(model, processor, as_labeled(pictures[:192])).top1 > 0.98
    found = retrieval(model, processor, scenes_of_two(pictures, 64, seed=0))
    assert found.text_to_image[1] > 0.6
    assert found.image_to_text[5] > 0.9
    assert sum(p.stat().st_size for p in Path(small_clip_path()).iterdir()) < 3.2e6


def test_the_shipped_tokenizer_is_the_scripts_and_words_are_whole():
    made, shipped = build_processor(all_words()), AutoProcessor.from_pretrained(small_clip_path())
    text = "a photo of a small yellow rectangle to the left of a teal circle"
    ids = shipped.tokenizer(text)["input_ids"]
    assert ids == made.tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split()) + 2
    assert (
        shipped.tokenizer.decode(shipped.tokenizer("quantized zebra!")["input_ids"][1:-1]).strip()
        == "quantized zebra!"
    )


def test_pairs_are_rows_for_calibration(pictures):
    rows = pairs(pictures, 20, seed=1)
    assert {frozenset(row) for row in rows} == {frozenset({"image", "caption"})}
    assert [row["caption"] for row in rows] == [row["caption"] for row in pairs(pictures, 20, seed=1)]
