import json
import math

import pytest
import torch
from tiny_models import build
from tiny_processors import build as build_processor
from tiny_processors import picture

from vlmq.calib.data import load
from vlmq.calib.tokens import ANSWER
from vlmq.eval import vqa
from vlmq.eval.vqa import (
    answer_accuracy,
    answer_nll,
    encode_questions,
    generate_answers,
    load_rows,
    normalise,
)

QUESTIONS = ("what color is the shape?", "is it a circle?", "why?")
ROWS = [
    {"image": picture(i), "question": question, "answer": answer}
    for i, (question, answer) in enumerate(zip(QUESTIONS, ("red", "yes", "no reason at all"), strict=True))
]


@pytest.fixture(scope="module")
def model():
    return build("llava")


@pytest.fixture(scope="module")
def processor():
    return build_processor("llava")


@pytest.mark.parametrize(
    ("answer", "text"), [(" Red. ", "red"), ("It's  red!", "its red"), ("", ""), ("YES", "yes")]
)
def test_normalise(answer, text):
    assert normalise(answer) == text


def test_generate_answers_do_not_depend_on_the_batch_size(model, processor):
    one_by_one = generate_answers(model, processor, ROWS, batch_size=1, max_new_tokens=5)
    assert generate_answers(model, processor, ROWS, batch_size=3, max_new_tokens=5) == one_by_one


def test_encode_questions_pads_on_the_left_and_leaves_the_processor_as_it_was(processor):
    processor.tokenizer.padding_side = "right"
    mask = encode_questions(ROWS, processor)["attention_mask"]
    assert mask[:, -1].all()
    assert not mask[:, 0].all()
    assert processor.tokenizer.padding_side == "right"


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "paligemma", "internvl", "idefics3"])
def test_answer_accuracy_runs_on_each_kind_of_processor(family):
    result = answer_accuracy(build(family), build_processor(family), ROWS[:2], max_new_tokens=3)
    assert result.n_questions == 2
    assert math.isfinite(result.answer_nll)


def test_answer_accuracy_compares_normalised_answers(model, processor, monkeypatch):
    monkeypatch.setattr(vqa, "generate_answers", lambda *_, **__: ["RED.", "yes", "no"])
    rows = [{**ROWS[0]}, {**ROWS[1], "answer": ["yep", "Yes!"]}, ROWS[2]]
    result = answer_accuracy(model, processor, rows)
    assert result.is_right == (True, True, False)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.answers == ("RED.", "yes", "no")


def test_answer_nll_equals_the_likelihood_of_the_answers_tokens(model, processor):
    batch = load([ROWS[0]], processor, n_samples=1)[0]
    log_p = model(**batch.inputs).logits[0].log_softmax(-1)
    ids, kinds = batch.inputs["input_ids"][0], batch.kinds[0]
    places = [t for t in range(1, len(ids)) if kinds[t] == ANSWER]
    expected = -sum(float(log_p[t - 1, ids[t]].detach()) for t in places) / len(places)
    assert answer_nll(model, processor, [ROWS[0]]) == pytest.approx(expected, rel=1e-4)


def test_answer_nll_does_not_depend_on_the_batch_size(model, processor):
    values = [answer_nll(model, processor, ROWS, batch_size=n) for n in (1, 3)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_answer_accuracy_without_questions_is_an_error(model, processor):
    with pytest.raises(ValueError, match="no question to ask"):
        answer_accuracy(model, processor, [])


def test_load_rows_opens_images_beside_the_file_in_order(tmp_path):
    picture().save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": f"q{i}?", "answer": "yes"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load_rows(tmp_path / "rows.jsonl")
    assert [row["question"] for row in rows] == ["q0?", "q1?", "q2?", "q3?", "q4?"]
    assert rows[0]["image"].size == (40, 30)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "a.png", "question": "q?"}, "row 0 .* expected image, question and answer"),
        ({"image": "missing.png", "question": "q?", "answer": "a"}, "row 0 .*missing.png"),
    ],
)
def test_load_rows_names_the_bad_row(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / "rows.jsonl")


def test_inputs_follow_the_models_dtype(processor):
    half = build("llava", dtype=torch.bfloat16)
    assert math.isfinite(answer_nll(half, processor, ROWS[:1]))
