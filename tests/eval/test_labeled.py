import json

import datasets
import pytest
from tiny_processors import picture

from vlmq.eval.labeled import load_captioned, load_labeled


@pytest.fixture
def folder(tmp_path):
    for name, numbers in {"cat": (0, 1), "dog": (2,)}.items():
        (tmp_path / name).mkdir()
        for i in numbers:
            picture(i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_class_folders_give_labels(folder):
    found = load_labeled(str(folder))
    assert found.classes == ("cat", "dog")
    assert found.labels == (0, 0, 1)
    assert found.images[2].size == picture(2).size


def test_n_images_draws_by_the_seed(folder):
    drawn = [load_labeled(folder, n_images=2, seed=seed) for seed in range(6)]
    assert {found.labels for found in drawn} == {(0, 0), (0, 1)}
    assert {found.classes for found in drawn} == {("cat", "dog")}


def test_a_dataset_names_its_numbers():
    features = datasets.Features(
        {"image": datasets.Image(), "fine_label": datasets.ClassLabel(names=["zebra", "ape", "cow"])}
    )
    rows = {"image": [picture(0), picture(1)], "fine_label": [2, 0]}
    found = load_labeled(datasets.Dataset.from_dict(rows, features=features))
    assert found.classes == ("zebra", "ape", "cow")
    assert found.labels == (2, 0)


def test_captions_one_or_several(folder):
    rows = [{"image": "cat/0.png", "caption": "a cat"}, {"image": "dog/2.png", "captions": ["a dog", "it"]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_captioned(folder / "rows.jsonl")
    assert found.captions == (("a cat",), ("a dog", "it"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "cat/0.png"}, "row 1 of .*expected a caption in a column of caption, .*found image"),
        ({"caption": "x"}, "row 1 of .*expected an image in a column"),
        ({"image": "gone.png", "caption": "x"}, "row 1 of .*gone.png' does not exist"),
        ({"image": "cat/0.png", "caption": " "}, "row 1 of .*captions that are no empty texts"),
    ],
)
def test_a_bad_row_is_named(folder, row, message):
    rows = [{"image": "cat/0.png", "caption": "a cat"}, row]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match=message):
        load_captioned(folder / "rows.jsonl")


def test_sources_that_cannot_serve(folder):
    with pytest.raises(ValueError, match="neither a folder, nor a file, nor the name of a data set"):
        load_labeled("no such thing")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images in folders of their classes"):
        load_labeled(folder / "empty")
    (folder / "dog").rename(folder / "empty" / "dog")
    with pytest.raises(ValueError, match=r"at least two classes to tell apart, found \['dog'\]"):
        load_labeled(folder / "empty")
    with pytest.raises(ValueError, match="at least two images, found 1"):
        load_captioned([{"image": picture(0), "caption": "one"}])
