import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import build
from tiny_processors import build as build_processor
from tiny_processors import picture

from vlmq import checkpoint
from vlmq.eval import demo
from vlmq.eval.demo import FIRST, WRONG, Width, choose_examples, run_demo
from vlmq.eval.token_map import token_map
from vlmq.eval.vqa import VqaResult


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build("llava").save_pretrained(folder)
    build_processor("llava").save_pretrained(folder)
    return folder


SMALL = {"schemes": ("int4-g16", "binary-g64"), "n_calibration": 4, "n_questions": 6, "n_examples": 2}


def test_run_demo_writes_table_picture_and_checkpoints(tiny, tmp_path):
    result = run_demo(tmp_path / "out", model_path=tiny, **SMALL)
    assert [row[0] for row in result.table.rows] == ["original", "int4-g16", "binary-g64"]
    assert all(path.stat().st_size > 0 for path in result.files)
    assert Image.open(result.files[0]).width > 500
    models = json.loads(result.files[2].read_text())["models"]
    sizes = [model["megabytes"] for model in models]
    assert sizes == sorted(sizes, reverse=True)
    assert models[1]["bits_per_weight"] > 4
    assert checkpoint.load(result.checkpoints["int4-g16"]).config.model_type == "llava"


def test_run_demo_again_replaces_its_files(tiny, tmp_path):
    small = {**SMALL, "schemes": ("int4-g16",), "n_examples": 1}
    first = run_demo(tmp_path, model_path=tiny, **small)
    again = run_demo(tmp_path, model_path=tiny, **small)
    assert first.table.rows[1][1:3] == again.table.rows[1][1:3]


def test_run_demo_notices_a_reload_that_differs(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.checkpoint, "load", lambda _: build("llava"))
    with pytest.raises(RuntimeError, match="int4-g16: the logits after reloading"):
        run_demo(tmp_path, model_path=tiny, **SMALL)


def width(*is_right: bool) -> Width:
    return Width("w", VqaResult(0.5, 0.1, ("a",) * len(is_right), is_right), 4.0, 1, None)


def test_choose_examples_takes_the_first_and_the_first_with_an_error():
    widths = [width(True, True, False, True, True, True), width(True, False, False, True, False, True)]
    assert choose_examples(widths, 4) == [(0, FIRST), (1, FIRST), (2, FIRST), (4, WRONG)]
    assert choose_examples([widths[0]] * 2, 4) == [(i, FIRST) for i in range(4)]


def test_choose_examples_of_few_questions():
    assert choose_examples([width(True)], 4) == [(0, FIRST)]


def test_token_map_is_relative_to_the_mean_and_leaves_the_model_as_it_was():
    model, row = build("llava"), {"image": picture(), "question": "what?", "answer": "noise"}
    before = [parameter.clone() for parameter in model.parameters()]
    scores = token_map(model, build_processor("llava"), row)
    assert scores.shape == (2, 2)
    assert scores.mean() == pytest.approx(1, rel=1e-4)
    assert (scores >= 0).all()
    assert np.ptp(scores) > 0
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
