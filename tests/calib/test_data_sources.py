"""Every kind of source becomes the rows it should, and every bad row is named before work starts."""

import io
import json

import datasets
import numpy as np
import pytest
import tiny_processors
import torch
from tiny_processors import picture
from transformers import BatchFeature

from vlmq.calib import ANSWER, load
from vlmq.calib.messages import DEFAULT_QUESTION, read_row
from vlmq.calib.sources import NAMED_SETS

LLAVA = tiny_processors.build("llava")


def encoded(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shape_of(raw) -> tuple[list[tuple[str, str]], int]:
    """Roles with texts (an image is [i]), and the number of images."""
    row = read_row(0, raw)
    texts = [
        (m["role"], "".join("[i]" if p["type"] == "image" else p["text"] for p in m["content"]))
        for m in row.messages
    ]
    return texts, len(row.images)


USER = ("user", f"[i]{DEFAULT_QUESTION}")
CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]


@pytest.mark.parametrize(
    ("raw", "turns"),
    [
        (picture(), [USER]),
        ("a/b.png", [USER]),
        ((picture(), "a cat"), [USER, ("assistant", "a cat")]),
        (("a cat", picture()), [USER, ("assistant", "a cat")]),
        ((picture(), "What?", "red"), [("user", "[i]What?"), ("assistant", "red")]),
        (([picture(), picture()], "two"), [("user", f"[i][i]{DEFAULT_QUESTION}"), ("assistant", "two")]),
        ({"image": picture(), "id": 7}, [USER]),
        ({"image": picture(), "text": "a cat"}, [USER, ("assistant", "a cat")]),
        ({"file_name": "x.png", "caption": ["one", "two"]}, [USER, ("assistant", "one")]),
        ({"image": picture(), "question": "What?"}, [("user", "[i]What?")]),
        (
            {"image": picture(), "question": "What?", "answer": "red"},
            [("user", "[i]What?"), ("assistant", "red")],
        ),
        ({"image": picture(), "text": "What?", "answer": 3}, [("user", "[i]What?"), ("assistant", "3")]),
        (
            {"img": "x.png", "question": "What?", "answers": [{"answer": "red"}, {"answer": "blue"}]},
            [("user", "[i]What?"), ("assistant", "red")],
        ),
        ({"image": None, "question": "What?", "answer": "red"}, [("user", "What?"), ("assistant", "red")]),
        ({"question": "What?", "answer": "red"}, [("user", "What?"), ("assistant", "red")]),
        ({"images": ["x.png"], "conversations": CONVERSATION}, [("user", "[i]What?"), ("assistant", "red")]),
        ({"image": "x.png", "messages": [{"role": "user", "content": "What?"}]}, [("user", "[i]What?")]),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "x.png"}, "text": None}],
                }
            ],
            [("user", "[i]")],
        ),
        (
            {"image": "x.png", "messages": [{"role": "user", "content": [{"type": "image"}, "What?"]}]},
            [("user", "[i]What?")],
        ),
    ],
)
def test_rows_become_chats(raw, turns):
    assert shape_of(raw) == (turns, sum(text.count("[i]") for _, text in turns))


def test_plain_text_rows_stay_text():
    assert read_row(0, "hello").text == "hello"
    assert read_row(0, {"text": "hello", "meta": 1}).text == "hello"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (" ", "text is empty"),
        ({"text": ""}, "column 'text' is empty"),
        ({"image": picture(), "caption": " "}, "column 'caption' is empty"),
        ({"image": None, "caption": "a cat"}, "column 'image' holds no image"),
        ({"image": [], "text": "a cat"}, "column 'image' holds no image"),
        ({"caption": "a cat"}, "neither an image nor a question"),
        ({"id": 1, "pixels": 2}, "no known column among id, pixels; understood: image images .* messages"),
        ({"conversations": CONVERSATION}, "message 0 refers to an image that the row does not have"),
        (
            {"images": ["x.png", "y.png"], "conversations": CONVERSATION},
            "1 image.s. more than its text refers to",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "refers to an image"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}],
            "type 'video' cannot be calibrated",
        ),
        ([{"role": "user", "content": None}], "holds no text"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}], "last message is empty"),
        ([{"content": "hi"}], "message 0 has no role"),
        ({"messages": []}, "conversation is empty"),
        (("a", "b"), "expected .image, text. or"),
        (3, "got int"),
    ],
)
def test_bad_rows_say_what_is_wrong(raw, message):
    with pytest.raises(ValueError, match=message):
        read_row(0, raw)


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_of_images(folder):
    assert load(folder, LLAVA).n_rows == 4
    assert load(str(folder), LLAVA, n_samples=2).n_rows == 2
    assert load(folder / "1.png", LLAVA).n_rows == 1


def test_folder_with_metadata(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "2.png", "text": "a cat"}) + "\n")
    calibration = load(folder, LLAVA)
    assert calibration.n_rows == 1
    assert calibration.n_answer_tokens > 0


def test_json_files_find_images_beside_them(folder):
    rows = [{"image": f"{i}.png", "question": "What?", "answer": "red"} for i in range(3)]
    (folder / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    assert load(folder / "rows.jsonl", LLAVA).hash == load(folder / "rows.json", LLAVA).hash


def test_dataset_streamed_or_not_equals_the_list():
    rows = {"image": [picture(i) for i in range(3)], "caption": ["red", "blue", "green"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    expected = load(list(zip(*rows.values(), strict=True)), LLAVA).hash
    assert load(dataset, LLAVA).hash == expected
    assert load(dataset.to_iterable_dataset(), LLAVA).hash == expected


def test_dataset_of_chats_with_lists_of_images():
    rows = {"images": [[picture(0)], []], "messages": [[], []]}
    rows["messages"] = [
        [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}],
        [{"role": "user", "content": "hello"}],
    ]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        }
    )
    calibration = load(datasets.Dataset.from_dict(rows, features=features), LLAVA)
    assert (calibration.n_rows, calibration.n_image_tokens) == (2, 4)


def test_dataset_with_a_corrupt_image_names_its_index():
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(3)]
    images[1]["bytes"] = images[1]["bytes"][:-200]
    dataset = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"1 of 3 rows .*\n  row 1: image .*corrupt"):
        load(dataset, LLAVA)
    with pytest.raises(ValueError, match="row 1: image"):
        load(dataset.to_iterable_dataset(), LLAVA)


def test_dataset_keeps_the_transform_that_was_set_on_it():
    dataset = datasets.Dataset.from_dict({"seed": [0, 1]})
    dataset.set_transform(lambda rows: {"image": [picture(seed) for seed in rows["seed"]]})
    assert load(dataset, LLAVA).hash == load([picture(0), picture(1)], LLAVA).hash


def test_dataset_dict_asks_for_a_split():
    with pytest.raises(ValueError, match="one of its splits: 'train', 'test'"):
        load(
            datasets.DatasetDict(
                {"train": datasets.Dataset.from_dict({}), "test": datasets.Dataset.from_dict({})}
            ),
            LLAVA,
        )


def test_generators_give_their_first_rows():
    assert (
        load((picture(i) for i in range(9)), LLAVA, n_samples=2).hash
        == load([picture(0), picture(1)], LLAVA).hash
    )


def test_arrays_and_tensors_of_pixels():
    array = np.stack([np.asarray(picture(i)) for i in range(2)])
    expected = load([picture(0), picture(1)], LLAVA).hash
    assert load(array, LLAVA).hash == expected
    assert load(torch.from_numpy(array / 255.0).permute(0, 3, 1, 2), LLAVA).hash == expected
    assert load(array[0], LLAVA).n_rows == 1


def test_one_conversation_is_one_row():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert load(turns, LLAVA).n_rows == 1


def test_token_ids_are_cut_and_stacked():
    ids = torch.arange(40).reshape(4, 10) + 10
    calibration = load(ids, tiny_processors.build("llama"), batch_size=3, max_tokens=7)
    assert [b.inputs["input_ids"].shape for b in calibration] == [(3, 7), (1, 7)]
    assert torch.equal(calibration[0].inputs["input_ids"], ids[:3, :7])
    assert load(ids, tiny_processors.build("llama"), n_samples=2).n_rows == 2


def test_ready_batches_pass_as_they_are():
    made = load([(picture(), "red"), (picture(1), "blue")], LLAVA)
    ready = [BatchFeature(dict(batch.inputs)) for batch in made]
    calibration = load(ready, LLAVA)
    assert calibration.n_image_tokens == made.n_image_tokens
    assert load(torch.utils.data.DataLoader(ready, batch_size=None), LLAVA).hash == calibration.hash
    assert load(ready[0], LLAVA).n_rows == 1
    assert load(ready, LLAVA, n_samples=1).n_rows == 1


def test_rows_with_token_lists():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [5, 6], "labels": [-100, -100]},
    ]
    calibration = load(datasets.Dataset.from_list(rows), tiny_processors.build("llama"))
    assert calibration[0].kinds.tolist()[0][2] == ANSWER
    assert "labels" not in calibration[0].inputs


def test_sampling_is_decided_by_the_seed():
    images = [picture(i) for i in range(20)]
    hashes = [load(images, LLAVA, n_samples=5, seed=seed).hash for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_hash_changes_with_a_pixel_a_kind_and_the_order():
    calibration = load([(picture(0), "red"), (picture(1), "blue")], LLAVA)
    again = load([(picture(0), "red"), (picture(1), "blue")], LLAVA)
    assert again.hash == calibration.hash
    assert load([(picture(1), "blue"), (picture(0), "red")], LLAVA).hash != calibration.hash
    assert calibration[:1].hash != calibration.hash
    again = load([(picture(0), "red"), (picture(1), "blue")], LLAVA)
    again[0].inputs["pixel_values"][0, 0, 0, 0] += 1e-3
    assert again.hash != calibration.hash


def test_description_counts():
    calibration = load([(picture(0), "red")], LLAVA)
    n_tokens = calibration[0].kinds.numel()
    assert calibration.description == f"list of 1: 1 rows, {n_tokens} tokens (4 of images, 4 of answers)"
    assert repr(calibration) == f"CalibrationSet({calibration.description}; 1 batches)"


def test_all_bad_rows_are_listed_together(folder):
    (folder / "2.png").write_bytes(b"no png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:300])
    with pytest.raises(ValueError, match="2 of 4 rows") as error:
        load(folder, LLAVA)
    assert "\n  row 2: image file" in str(error.value)
    assert "\n  row 3: image file" in str(error.value)
    assert "3.png' is corrupt" in str(error.value)


def test_at_most_ten_bad_rows_are_listed():
    with pytest.raises(ValueError, match="13 of 14 rows") as error:
        load([picture(), *[f"missing{i}.png" for i in range(13)]], LLAVA)
    assert str(error.value).count("does not exist") == 10
    assert str(error.value).endswith("and 3 more")


def test_rows_with_the_same_trouble_share_a_line():
    rows = [{"id": 1, "pixels": 2}] * 3
    with pytest.raises(ValueError, match="rows 0, 1, 2: no known column among id, pixels; understood: image"):
        load(rows, LLAVA)


def test_what_the_processor_refuses_is_reported_by_row():
    processor = tiny_processors.build("llava")
    guard = (
        "{% if messages[0]['content'][0]['text'] == 'bad' %}{{ raise_exception('no such chat') }}{% endif %}"
    )
    processor.chat_template = guard + processor.chat_template
    with pytest.raises(ValueError, match="row 1: LlavaProcessor refused it: no such chat"):
        load([{"question": "good"}, {"question": "bad"}], processor)


@pytest.mark.parametrize(
    ("source", "family", "message"),
    [
        (
            [picture()],
            "llama",
            "row 0: the row has an image, but .* is a tokenizer: give the model's AutoProcessor",
        ),
        (["hello"], "clip", "row 0: CLIPProcessor takes one image per row, got 0"),
        ([], "llava", "is empty: give at least one"),
        ("no-such-set", "llava", "neither a file, a folder, nor a known set; known sets: flickr30k"),
    ],
)
def test_unusable_sources_say_so(source, family, message):
    with pytest.raises(ValueError, match=message):
        load(source, tiny_processors.build(family))


def test_model_in_place_of_the_processor():
    with pytest.raises(TypeError, match="expected the model's AutoProcessor, got the model Linear"):
        load([picture(0)], torch.nn.Linear(2, 2))


def test_source_of_a_wrong_type():
    with pytest.raises(TypeError, match="calibration source: expected .* got int"):
        load(3, LLAVA)


@pytest.mark.parametrize("option", ["n_samples", "max_tokens", "batch_size", "max_pixels"])
def test_options_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option}: expected .*at least 1, got 0"):
        load([picture()], LLAVA, **{option: 0})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": ', "rows.jsonl', line 2 is not valid json"),
        ("rows.json", '{"text": "a"}', "expected a list of rows, got dict"),
        ("rows.csv", "a,b", "expected .jsonl, .json or an image, got '.csv'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name, LLAVA)


def test_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        load(tmp_path, LLAVA)


def test_named_set_reads_its_columns_from_the_hub(monkeypatch):
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(3)]
    dataset = datasets.Dataset.from_dict({"image": images, "caption": [["a", "b"]] * 3, "other": [1, 2, 3]})
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return dataset.cast_column("image", datasets.Image()).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    calibration = load("flickr30k", LLAVA, n_samples=2)
    assert asked == [((NAMED_SETS["flickr30k"].hub_id, None), {"split": "test", "streaming": True})]
    assert (calibration.n_rows, calibration.source) == (2, "flickr30k")
    assert calibration.n_answer_tokens == 2 * len(["a", "</s>", "\n"])


def test_named_set_without_a_hub_says_so(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match="'flickr30k' .* could not be read: Couldn't reach the Hub; without a hub"
    ):
        load("flickr30k", LLAVA)
