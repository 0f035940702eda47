"""The data of each family's own processor goes through the matching model, and every token is of the right
kind."""

import logging

import pytest
import tiny_models
import tiny_processors
import torch
from tiny_processors import picture
from transformers import CLIPVisionModel

from vlmq.calib import ANSWER, IMAGE, PADDING, TEXT, as_batches, load
from vlmq.calib.answers import answer_mask

VISION_LANGUAGE = [f for f in tiny_processors.FAMILIES if f not in ("clip", "siglip", "llama")]
CHAT = [f for f in VISION_LANGUAGE if f != "paligemma"]
PAIRS = [
    (picture(0), "what is it?", "red"),
    (picture(1, 100, 30), "what is that there?", "its blue and yellow"),
    (picture(2, 20, 90), "a caption"),
]


def said(calibration, processor) -> list[str]:
    """What the tokens of kind ANSWER say, one string per row."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return [
        "".join(tokenizer.convert_ids_to_tokens(ids[kinds == ANSWER]))
        for batch in calibration
        for ids, kinds in zip(batch.inputs["input_ids"], batch.kinds, strict=True)
    ]


def chat(*turns):
    """Messages from turns ("u" or "a", part, ...); an image stands for an image part, a string for a text
    part."""
    return [
        {
            "role": {"u": "user", "a": "assistant", "s": "system"}[role],
            "content": [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
                for p in parts
            ],
        }
        for role, *parts in turns
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", [*VISION_LANGUAGE, "clip", "siglip"])
def test_load_gives_batches_that_the_model_forwards(family, batch_size):
    calibration = load(PAIRS, tiny_processors.build(family), batch_size=batch_size)
    model = tiny_models.build(family)
    for batch in as_batches(calibration, model):
        with torch.no_grad():
            output = model(**batch.inputs)
        logits = output.logits if family in VISION_LANGUAGE else output.logits_per_image
        assert torch.isfinite(logits).all()
        assert batch.kinds.shape == batch.inputs["input_ids"].shape
    assert calibration.n_rows == 3
    assert [len(b.kinds) for b in calibration] == {1: [1, 1, 1], 2: [2, 1]}[batch_size]


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_image_tokens_are_those_that_the_model_replaces(family):
    model = tiny_models.build(family)
    image_id = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    for batch in load(PAIRS, tiny_processors.build(family)):
        assert torch.equal(batch.kinds == IMAGE, batch.inputs["input_ids"] == image_id)
        assert (batch.kinds == IMAGE).any()


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_batched_rows_keep_their_kinds(family):
    processor = tiny_processors.build(family)
    alone, together = load(PAIRS, processor), load(PAIRS, processor, batch_size=3)
    assert len(together) == 1
    for i, single in enumerate(alone):
        kinds = together[0].kinds[i]
        assert torch.equal(kinds[kinds != PADDING], single.kinds[0])
        assert torch.equal(
            together[0].inputs["input_ids"][i][kinds != PADDING], single.inputs["input_ids"][0]
        )
    assert (together[0].kinds == PADDING).any()


@pytest.mark.parametrize("family", CHAT)
def test_answers_are_what_the_assistant_says(family):
    processor = tiny_processors.build(family)
    answers = said(load(PAIRS, processor), processor)
    assert answers == [text + "</s>\n" for text in ("red", "its blue and yellow", "a caption")]


@pytest.mark.parametrize("family", CHAT)
def test_answers_follow_the_tags_of_the_template(family):
    processor = tiny_processors.build(family, tags=True)
    answers = [text.removesuffix("\n") for text in said(load(PAIRS, processor), processor)]
    assert answers == [text + "</s>" for text in ("red", "its blue and yellow", "a caption")]


def test_tags_that_disagree_with_the_turns_are_not_believed():
    chats, ids = chat(("u", "what"), ("a", "red")), list(range(10))
    texts = {False: ids, True: ids[:6]}
    functions = {"render": lambda _, opened: opened, "tokenize": texts.get, "encode": None}
    expected = torch.arange(10) >= 6
    within = (torch.arange(10) == 7) | (torch.arange(10) == 8)
    for tagged, answer in (
        (None, expected),
        (within, within),
        (within.roll(-3), expected),
        (within & False, expected),
    ):
        assert torch.equal(answer_mask(chats, ids, tagged, **functions), answer)


def test_answers_of_paligemma_are_its_suffix():
    processor = tiny_processors.build("paligemma")
    answers = said(load(PAIRS, processor), processor)
    assert answers == ["red</s>", "its blue and yellow</s>", "a caption</s>"]


@pytest.mark.parametrize("family", CHAT)
def test_answers_of_many_turns_are_found_with_images_after_them(family):
    turns = chat(
        ("s", "be brief"),
        ("u", picture(0), "what"),
        ("a", "one"),
        ("u", "and", picture(1)),
        ("a", "two"),
        ("u", "so?"),
    )
    expected = "one</s>\ntwo</s>\n"
    processor = tiny_processors.build(family)
    assert said(load([turns], processor), processor) == [expected]
    tagged = tiny_processors.build(family, tags=True)
    assert said(load([turns], tagged), tagged)[0].replace("\n", "") == expected.replace("\n", "")


def test_answer_that_shares_a_token_with_the_prompt_counts_from_that_token():
    processor = tiny_processors.build("llama")
    turns = chat(("u", "what"), ("a", "red"))
    turns[1]["content"][0]["text"] = "\nred"
    processor.chat_template = processor.chat_template.replace("part['text']", "'\\n' + part['text']")
    assert said(load([turns], processor), processor) == ["\n\nred</s>\n"]


def test_chat_that_starts_with_the_assistant():
    processor = tiny_processors.build("llama")
    assert said(load([chat(("a", "hello"), ("u", "what"))], processor), processor) == [
        "<|assistant|>\nhello</s>\n"
    ]


def test_image_without_text_has_a_question_and_no_answer():
    calibration = load([picture()], tiny_processors.build("llava"))
    assert calibration.n_answer_tokens == 0
    assert calibration.n_image_tokens == 4


def test_processor_without_template_gets_image_tokens_and_finds_answers():
    processor = tiny_processors.build("llava")
    processor.chat_template = None
    calibration = load(PAIRS[:2], processor)
    assert said(calibration, processor) == ["red", "its blue and yellow"]
    assert calibration.n_image_tokens == 8


def test_plain_texts_and_chats_for_a_language_model():
    tokenizer = tiny_processors.build("llama")
    rows = ["hello the world", chat(("u", "what is it"), ("a", "red")), "bye"]
    calibration = load(rows, tokenizer, batch_size=3)
    (batch,) = as_batches(calibration, tiny_models.build("llama"))
    assert tokenizer.decode(batch.inputs["input_ids"][0][batch.kinds[0] == TEXT]) == "hello the world"
    assert said(calibration, tokenizer) == ["", "red</s>\n", ""]
    assert torch.equal(batch.inputs["attention_mask"] == 0, batch.kinds == PADDING)
    assert torch.isfinite(tiny_models.build("llama")(**batch.inputs).logits).all()


def test_texts_for_a_vision_language_model_do_not_share_a_batch_with_images():
    rows = ["hello", (picture(), "a red thing"), "bye bye"]
    calibration = load(rows, tiny_processors.build("llava"), batch_size=3)
    assert ["pixel_values" in batch.inputs for batch in calibration] == [True, False]
    model = tiny_models.build("llava")
    assert all(torch.isfinite(model(**batch.inputs).logits).all() for batch in as_batches(calibration, model))


def test_captions_of_a_dual_encoder_are_the_given_texts():
    processor = tiny_processors.build("clip")
    (batch,) = load([(picture(), "red ball"), (picture(), "blue")], processor, batch_size=2)
    captions = processor.tokenizer.batch_decode(batch.inputs["input_ids"], skip_special_tokens=True)
    assert captions == ["red ball", "blue"]
    assert torch.equal(batch.kinds == PADDING, batch.inputs["attention_mask"] == 0)


def test_siglip_captions_fill_the_length_and_count_as_the_model_sees_them():
    (batch,) = load([(picture(), "red")], tiny_processors.build("siglip"))
    assert batch.kinds.tolist() == [[TEXT] * 16]


def test_dual_encoder_without_captions_warns(caplog):
    with caplog.at_level(logging.WARNING):
        load([picture()], tiny_processors.build("clip"))
    assert "no captions" in caplog.text


def test_image_processor_alone_feeds_a_vision_model():
    processor = tiny_processors.build("clip").image_processor
    calibration = load([picture(i) for i in range(3)], processor, batch_size=2)
    model = CLIPVisionModel(tiny_models.build("clip").config.vision_config)
    batches = as_batches(calibration, model)
    assert [b.kinds.shape for b in batches] == [(2, 0), (1, 0)]
    assert all(torch.isfinite(model(**b.inputs).last_hidden_state).all() for b in batches)


def test_rows_whose_image_does_not_fit_are_dropped_and_counted(caplog):
    processor = tiny_processors.build("internvl")
    with caplog.at_level(logging.INFO):
        calibration = load(PAIRS, processor, max_tokens=60)
    assert calibration.n_dropped == 1
    assert calibration.n_rows == 2
    assert "1 rows dropped" in calibration.description
    assert "row 0 dropped" in caplog.text


def test_text_behind_an_image_is_cut():
    processor = tiny_processors.build("llava")
    whole, cut = load(PAIRS[:1], processor), load(PAIRS[:1], processor, max_tokens=10)
    assert torch.equal(cut[0].kinds, whole[0].kinds[:, :10])
    assert cut[0].inputs["input_ids"].shape == cut[0].inputs["attention_mask"].shape == (1, 10)
    assert cut[0].inputs["pixel_values"].shape == whole[0].inputs["pixel_values"].shape


def test_cut_rows_stay_alone_in_batches():
    processor = tiny_processors.build("llava")
    calibration = load(PAIRS, processor, max_tokens=24, batch_size=3)
    assert sorted(b.kinds.shape for b in calibration) == [(1, 23), (1, 24), (1, 24)]


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="all 3 rows .* dropped.*raise max_tokens or lower max_pixels"):
        load(PAIRS, tiny_processors.build("internvl"), max_tokens=12)


def test_max_pixels_lowers_the_number_of_image_tokens():
    image = picture(0, 90, 90)
    for family, max_pixels in (("qwen2_vl", 56 * 56), ("idefics3", 28 * 28)):
        processor = tiny_processors.build(family)
        large, small = load([image], processor), load([image], processor, max_pixels=max_pixels)
        assert small.n_image_tokens < large.n_image_tokens
