import numpy as np
import pytest
from PIL import Image

from vlmq.eval.picture import Answers, Example, draw


def example(group: str = "first") -> Example:
    image = Image.new("RGB", (16, 16), "teal")
    return Example(image, "what color is the shape?", "teal", np.arange(16.0).reshape(4, 4), group)


def test_draw_writes_a_picture_as_wide_as_its_questions(tmp_path):
    rows = [Answers("original", "16 bits", ("teal",), (True,)), Answers("binary", "1 bit", ("",), (False,))]
    wide = [Answers(r.name, r.figures, r.answers * 3, r.is_right * 3) for r in rows]
    draw(tmp_path / "one.png", "Title", "subtitle", [example()], rows)
    draw(tmp_path / "three.png", "Title", "subtitle", [example(), example(), example("wrong")], wide)
    one, three = Image.open(tmp_path / "one.png"), Image.open(tmp_path / "three.png")
    assert three.width > one.width
    assert three.height == one.height


def test_draw_marks_right_and_wrong_in_green_and_red(tmp_path):
    rows = [Answers("original", "", ("teal",), (True,)), Answers("binary", "", ("blue",), (False,))]
    draw(tmp_path / "a.png", "", "", [example()], rows)
    colours = {tuple(c) for c in np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)}
    assert {(0xE4, 0xF4, 0xEA), (0xFC, 0xE8, 0xE6)} <= colours


def test_draw_shows_every_pixel_of_the_image_as_a_square(tmp_path):
    image = Image.new("RGB", (16, 16), "white")
    image.putpixel((8, 8), (255, 0, 255))
    shown = Example(image, "q?", "a", np.ones((4, 4)), "first")
    draw(tmp_path / "a.png", "", "", [shown], [Answers("original", "", ("a",), (True,))])
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero((pixels == (255, 0, 255)).all(-1))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert len(rows) == height * width
    assert height == pytest.approx(width, abs=2)


@pytest.mark.parametrize("examples", [[], [example(), example()]])
def test_draw_refuses_answers_that_do_not_fit(tmp_path, examples):
    with pytest.raises(ValueError, match="expected an answer of each model"):
        draw(tmp_path / "a.png", "", "", examples, [Answers("original", "", ("a",), (True,))])
