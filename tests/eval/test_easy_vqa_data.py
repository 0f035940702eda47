"""Shipped rows of easy-vqa: balanced, readable without the package, written reproducibly."""

import sys

import pytest

from vlmq.eval import easy_vqa_data
from vlmq.eval.easy_vqa_data import QUESTION_KINDS, as_messages, load_easy_vqa, load_shapes, question_kind


@pytest.mark.parametrize(("part", "n_rows"), [("calibration", 256), ("test", 512)])
def test_load_shapes_gives_balanced_rows(part, n_rows):
    rows = load_shapes(part)

    assert len(rows) == n_rows
    assert [question_kind(row["question"]) for row in rows] == list(QUESTION_KINDS) * (n_rows // 4)
    assert {(row["image"].mode, row["image"].size) for row in rows} == {("RGB", (64, 64))}


def test_load_shapes_takes_the_first_rows():
    first, all_rows = load_shapes("test", n_rows=5), load_shapes("test")

    assert [row["question"] for row in first] == [row["question"] for row in all_rows[:5]]


@pytest.mark.parametrize("n_rows", [-1, 513])
def test_load_shapes_refuses_more_rows_than_there_are(n_rows):
    with pytest.raises(ValueError, match=f"0 to 512 .* got {n_rows}"):
        load_shapes("test", n_rows=n_rows)


def test_load_shapes_names_the_known_parts():
    with pytest.raises(ValueError, match="'train' .* known: calibration test"):
        load_shapes("train")  # pyright: ignore[reportArgumentType]


def test_load_shapes_works_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)

    assert load_shapes("test", n_rows=1)
    with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
        load_easy_vqa("test")


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what is the color of the circle?", "color"),
        ("what is the red shape?", "shape"),
        ("is there a circle?", "presence"),
        ("is there not a circle?", "absence"),
        ("is no red shape present?", "absence"),
    ],
)
def test_question_kind(question, kind):
    assert question_kind(question) == kind


def test_as_messages_leaves_the_answer_out_if_asked():
    row = load_shapes("test", n_rows=1)[0]

    with_answer, without = as_messages(row), as_messages(row, with_answer=False)

    assert with_answer[:1] == without
    assert with_answer[1]["content"] == [{"type": "text", "text": row["answer"]}]


def test_shipped_rows_are_rows_of_their_split():
    pytest.importorskip("easy_vqa")
    known = {(r["image"].tobytes(), r["question"], r["answer"]) for r in load_easy_vqa("test")}

    assert all((r["image"].tobytes(), r["question"], r["answer"]) in known for r in load_shapes("test"))


def test_write_shapes_writes_the_same_bytes_again(tmp_path):
    pytest.importorskip("easy_vqa")

    for name in ("a.zip", "b.zip"):
        easy_vqa_data.write_shapes(tmp_path / name, n_calibration=6, n_test=9, seed=3)

    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
