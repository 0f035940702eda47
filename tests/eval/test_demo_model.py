"""The shipped model loads by the Auto classes, is small, answers; its training sees questions one by one."""

import pytest
import torch
from installed import needs_transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmq.eval.demo_card import measure_accuracy
from vlmq.eval.demo_model import N_IMAGE_TOKENS, build_model, build_processor
from vlmq.eval.easy_vqa_data import as_messages, demo_model_path, load_shapes
from vlmq.eval.train_demo import group_by_picture, make_batch, move_shape


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(demo_model_path())


def test_model_is_small_bfloat16_and_mostly_linear(model):
    n_linear = sum(m.weight.numel() for m in model.model.modules() if type(m) is torch.nn.Linear)

    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert n_linear > 0.9 * model.num_parameters()
    assert sum(f.stat().st_size for f in demo_model_path().rglob("*") if f.is_file()) <= 12e6


def test_model_answers_the_shipped_questions(model, processor):
    accuracy = measure_accuracy(model, processor, load_shapes("test", n_rows=128))

    assert accuracy["all"] >= 0.95


@needs_transformers("5.18", "finds no character of an answer in the tokens of a LLaVA prompt")
def test_chat_template_marks_the_assistants_turn(processor):
    row = load_shapes("test", n_rows=1)[0]
    inputs = processor.apply_chat_template(
        as_messages(row),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0].bool()

    assert (ids == processor.image_token_id).sum() == N_IMAGE_TOKENS
    assert processor.tokenizer.decode(ids[mask]) == f" {row['answer']}</s>"


def test_tokenizer_reads_any_text_back(processor):
    text = " Räume 42 & çircles?"

    assert (
        processor.tokenizer.decode(processor.tokenizer.encode(text, add_special_tokens=False)) == text.lower()
    )


def test_packed_questions_are_seen_one_by_one():
    rows = load_shapes("test", n_rows=3)
    rows = [{**rows[0], "question": row["question"], "answer": row["answer"]} for row in rows]
    processor = build_processor([row["question"] for row in rows])
    model = build_model(processor, seed=1).eval()
    prefix = processor.tokenizer.encode("<s><|user|>" + "<image>" * N_IMAGE_TOKENS, add_special_tokens=False)
    batch = make_batch(group_by_picture(rows, processor), [0], prefix, None, torch.Generator())
    del batch["labels"]

    with torch.inference_mode():
        packed = model.model(**batch).last_hidden_state[0, len(prefix) :]
        alone = []
        for row in rows:
            inputs = processor.apply_chat_template(
                as_messages(row), tokenize=True, return_dict=True, return_tensors="pt"
            )
            alone.append(model.model(**inputs).last_hidden_state[0, len(prefix) :])

    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_move_shape_keeps_the_pixels():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.full((3, 64, 64), 240, dtype=torch.uint8)
    pixels[:, 5:12, 30:50] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]

    moved = [move_shape(pixels, generator) for _ in range(200)]

    for one in moved:
        place = (one[1] == 0).nonzero()
        first, last = place.min(dim=0).values, place.max(dim=0).values
        assert (last - first + 1).tolist() == [7, 20]
        assert (one[1] == 0).sum() == 140
    assert len({one.numpy().tobytes() for one in moved}) > 100
