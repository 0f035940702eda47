"""Ready data of every form becomes batches with the right kinds, or an error that names the batch."""

import pytest
import tiny_models
import tiny_processors
import torch
from tiny_processors import picture
from torch import nn
from transformers import BatchFeature

from vlmq.calib import ANSWER, IMAGE, PADDING, TEXT, CalibBatch, as_batches, load

LLAMA = tiny_models.build("llama")


@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if f != "llama"])
def test_ready_dicts_of_every_family(family):
    model = tiny_models.build(family)
    raw = tiny_models.inputs(family, n_batches=2, rows=2)
    batches = as_batches(raw, model)
    assert [b.inputs.keys() for b in batches] == [r.keys() for r in raw]
    n_images = 0 if family in tiny_models.DUAL_ENCODERS else 2 * 2 * 4
    assert sum(int((b.kinds == IMAGE).sum()) for b in batches) == n_images


@pytest.mark.parametrize(
    "form", ["tensor", "list", "rows", "arrays", "dicts", "loader", "feature", "batches"]
)
def test_token_ids_in_every_form(form):
    ids = torch.arange(20).reshape(2, 10) + 10
    data = {
        "tensor": ids,
        "list": [ids[:1], ids[1:]],
        "rows": [ids[0], ids[1]],
        "arrays": [ids[0].numpy(), ids[1].tolist()],
        "dicts": [{"input_ids": ids[0]}, {"input_ids": ids[1].tolist()}],
        "loader": torch.utils.data.DataLoader([{"input_ids": row} for row in ids]),
        "feature": (BatchFeature({"input_ids": row[None]}) for row in ids),
        "batches": [
            CalibBatch({"input_ids": row[None]}, torch.full((1, 10), TEXT, dtype=torch.int8)) for row in ids
        ],
    }[form]
    batches = as_batches(data, LLAMA)
    assert [b.inputs["input_ids"].tolist() for b in batches] == [ids[:1].tolist(), ids[1:].tolist()]
    assert all(b.kinds.tolist() == [[TEXT] * 10] and b.kinds.dtype == torch.int8 for b in batches)


def test_one_batch_stands_for_a_list_of_one():
    assert len(as_batches({"input_ids": torch.ones(3, 4, dtype=torch.long)}, LLAMA)) == 1


def test_kinds_from_mask_labels_and_image_ids():
    inputs = {
        "input_ids": torch.tensor([[0, 5, 199, 199, 6, 7, 8]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[0, -100, 199, 199, -100, 7, 8]]),
    }
    (batch,) = as_batches(inputs, tiny_models.build("llava"))
    assert batch.kinds.tolist() == [[PADDING, TEXT, IMAGE, IMAGE, TEXT, ANSWER, ANSWER]]
    assert "labels" not in batch.inputs
    assert "labels" in inputs


def test_token_types_tell_images_where_no_id_does():
    inputs = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "mm_token_type_ids": torch.tensor([[0, 1, 2, 3]]),
    }
    (batch,) = as_batches(inputs, LLAMA)
    assert batch.kinds.tolist() == [[TEXT, IMAGE, IMAGE, TEXT]]


def test_image_tokens_that_only_the_model_knows_are_added():
    processor = tiny_processors.build("llava")
    calibration = load([(picture(), "red")], processor)
    calibration[0].kinds[calibration[0].kinds == IMAGE] = TEXT
    (batch,) = as_batches(calibration, tiny_models.build("llava"))
    assert (batch.kinds == IMAGE).sum() == 4


def test_inputs_that_the_forward_does_not_take_are_left_out():
    class Model(nn.Module):
        def forward(self, input_ids):
            return input_ids

    (batch,) = as_batches({"input_ids": torch.ones(1, 3, dtype=torch.long), "token_type_ids": None}, Model())
    assert batch.inputs.keys() == {"input_ids"}


def test_images_for_a_language_model_are_an_error():
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "pixel_values": torch.ones(1, 3, 4, 4)}
    with pytest.raises(ValueError, match="batch 0 holds images, but LlamaForCausalLM takes no pixel_values"):
        as_batches([inputs], LLAMA)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, r"batch 0: expected input_ids .* shape \(1, 0\)"),
        ({"input_ids": torch.ones(1, 4)}, "batch 0: expected integer input_ids, got torch.float32"),
        (
            {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)},
            "attention_mask .* does not fit",
        ),
        (
            {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)},
            "every token is padding",
        ),
    ],
)
def test_bad_batches_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        as_batches([inputs], LLAMA)


def test_empty_set_says_what_to_give():
    with pytest.raises(ValueError, match="calibration set is empty: give at least one batch"):
        as_batches([], LLAMA)


@pytest.mark.parametrize(
    "data", ["folder", [picture()], [(picture(), "red")], ["hello"], 3, [[torch.ones(1, 3, 4, 4)]]]
)
def test_raw_data_points_to_load(data):
    with pytest.raises(TypeError, match=r"vlmq\.calib\.load\(source, processor\)"):
        as_batches(data, LLAMA)
