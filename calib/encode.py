"""Rows through the model's own processor, one function for each way in which a processor is used.

| processor | how |
|---|---|
| with a chat template (and bare tokenizers with one) | `apply_chat_template` on the messages |
| without, but with an image token | called with the text, an image token for each image, and the images |
| dual encoders (CLIP, SigLIP, ALIGN, ...) | called with caption and image, captions padded |
| image processors (a vision model alone) | called with the images |
| plain text, any processor | its tokenizer |

Rows are encoded one by one, which finds bad rows and row lengths and gives the kinds of tokens. Rows with
images that share a batch are then encoded again together, since every family pads images in its own way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmq.calib.answers import answer_mask
from vlmq.calib.batches import processor_image_token_ids, token_kinds
from vlmq.calib.messages import DEFAULT_QUESTION, Message, Row, text_of
from vlmq.calib.prompts import (
    Images,
    encode_chats,
    encode_texts,
    is_dual_encoder,
    is_image_processor,
    is_tokenizer,
    marks_answers,
    plain_tokenizer,
    renderer,
    template_of,
)
from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch

NO_CAPTION = "a photo"
# A tokenizer without a limit of its own reports a huge one.
NO_LIMIT = 1_000_000


def check_row(row: Row, processor: Any) -> None:
    """See that the processor can take what the row has.

    Raises:
        ValueError: images for a tokenizer, no image for a dual encoder or an image processor, or several for
            a pair.
    """
    name = type(processor).__name__
    if row.images and is_tokenizer(processor):
        raise ValueError(f"the row has an image, but {name} is a tokenizer: give the model's AutoProcessor")
    takes_one = is_dual_encoder(processor) or is_image_processor(processor)
    if takes_one and len(row.images) != 1:
        raise ValueError(f"{name} takes one image per row, got {len(row.images)}")


def caption_of(row: Row) -> str | None:
    """What a dual encoder reads: the last answer or caption, else the question, else None."""
    texts = [(m["role"], text_of(m)) for m in row.messages if text_of(m) not in ("", DEFAULT_QUESTION)]
    answers = [text for role, text in texts if role == "assistant"]
    return answers[-1] if answers else texts[-1][1] if texts else None


def encode_row(
    row: Row, images: Images, processor: Any, *, max_tokens: int, max_pixels: int | None
) -> CalibBatch:
    """Encode one row and tell its tokens apart.

    Args:
        row: normalised.
        images: the row's images, opened.
        processor: the model's own.
        max_tokens: plain text and captions are cut here already; chats come back whole.
        max_pixels: for processors that would enlarge an image again, see `_image_options`.

    Returns:
        A batch of one row.
    """
    image_ids = processor_image_token_ids(processor)
    if row.text is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        inputs = dict(tokenizer([row.text], truncation=True, max_length=max_tokens, return_tensors="pt"))
        return CalibBatch(inputs, token_kinds(inputs, image_ids))
    if is_dual_encoder(processor) or is_image_processor(processor):
        inputs = encode_together([row], [images], processor, max_tokens=max_tokens, max_pixels=max_pixels)
        return CalibBatch(inputs, token_kinds(inputs, frozenset()))

    options = _image_options(processor, max_pixels)
    if template_of(processor):
        has_tags = marks_answers(processor)
        inputs = encode_chats([row.messages], [images], processor, options, assistant_mask=has_tags)
    else:
        inputs = encode_texts([row.messages], [images], processor, options)
    labels, tagged = inputs.pop("labels", None), inputs.pop("assistant_masks", None)
    kinds = token_kinds(inputs, image_ids, labels)
    if labels is None and any(m["role"] == "assistant" for m in row.messages):
        answers = answer_mask(
            row.messages,
            inputs["input_ids"][0].tolist(),
            None if tagged is None else torch.as_tensor(tagged)[0] == 1,
            render=renderer(processor),
            tokenize=plain_tokenizer(processor),
            encode=_prefix_encoder(images, processor, options),
        )
        kinds[answers[None] & (kinds == TEXT)] = ANSWER
    return CalibBatch(inputs, kinds)


def encode_together(
    rows: Sequence[Row], images: Sequence[Images], processor: Any, *, max_tokens: int, max_pixels: int | None
) -> dict[str, Any]:
    """Encode rows with images as one padded batch; the arguments are those of `encode_row`.

    Returns:
        The model's inputs, without labels.
    """
    options = _image_options(processor, max_pixels)
    if is_image_processor(processor):
        inputs = dict(processor(images=[row[0] for row in images], return_tensors="pt", **options))
    elif is_dual_encoder(processor):
        captions = [caption_of(row) or NO_CAPTION for row in rows]
        text_options = caption_options(processor.tokenizer, max_tokens)
        pictures = [row[0] for row in images]
        inputs = dict(
            processor(text=captions, images=pictures, return_tensors="pt", **text_options, **options)
        )
    elif template_of(processor):
        inputs = encode_chats([row.messages for row in rows], images, processor, options)
    else:
        inputs = encode_texts([row.messages for row in rows], images, processor, options)
    inputs.pop("labels", None)
    return inputs


def batch_kinds(inputs: dict[str, Any], singles: Sequence[CalibBatch]) -> torch.Tensor:
    """Carry the kinds of rows encoded one by one over to the padded batch of the same rows.

    Raises:
        RuntimeError: the processor gave a row other tokens in the batch than alone.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        return torch.cat([single.kinds for single in singles])
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    kinds = torch.full(ids.shape, PADDING, dtype=torch.int8)
    for i, single in enumerate(singles):
        alone = single.inputs["input_ids"][0][single.kinds[0] != PADDING]
        place = mask[i] != 0
        if not torch.equal(ids[i][place], alone):
            raise RuntimeError(
                "the processor encodes a row differently in a batch than alone: use batch_size=1"
            )
        kinds[i][place] = single.kinds[0][single.kinds[0] != PADDING]
    return kinds


def cut(batch: CalibBatch, max_tokens: int) -> CalibBatch | None:
    """Cut one row to `max_tokens`; None where that would cut into an image."""
    n_tokens = batch.kinds.shape[1]
    if n_tokens <= max_tokens:
        return batch
    if (batch.kinds[:, max_tokens:] == IMAGE).any():
        return None
    inputs = {
        name: value[:, :max_tokens] if _is_per_token(name, value, n_tokens) else value
        for name, value in batch.inputs.items()
    }
    return CalibBatch(inputs, batch.kinds[:, :max_tokens])


def _is_per_token(name: str, value: Any, n_tokens: int) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and value.shape[:2] == (1, n_tokens)
    return is_tensor and not name.startswith(("pixel", "image"))


def _prefix_encoder(
    images: Images, processor: Any, options: dict[str, Any]
) -> Callable[[Sequence[Message], bool], list[int]]:
    """A function from the first messages of a chat to their token ids, images expanded."""

    def encode(chat: Sequence[Message], open_answer: bool) -> list[int]:
        n_images = sum(part["type"] == "image" for m in chat for part in m["content"])
        used = [images[:n_images]]
        if template_of(processor):
            inputs = encode_chats([chat], used, processor, options, add_generation_prompt=open_answer)
        else:
            inputs = encode_texts([chat], used, processor, options)
        return inputs["input_ids"][0].tolist()

    return encode


def caption_options(tokenizer: Any, max_tokens: int) -> dict[str, Any]:
    """Captions are cut at the tokenizer's limit.

    They are padded to that limit where no attention mask tells padding from text: such a model (SigLIP) was
    trained so.
    """
    limit = tokenizer.model_max_length
    has_mask = "attention_mask" in tokenizer.model_input_names
    padding = True if has_mask or limit >= NO_LIMIT else "max_length"
    return {"padding": padding, "truncation": True, "max_length": min(limit, max_tokens)}


def _image_options(processor: Any, max_pixels: int | None) -> dict[str, Any]:
    """Keep a processor that scales each image to one longest edge (SmolVLM) from enlarging it again."""
    image_processor = (
        processor if is_image_processor(processor) else getattr(processor, "image_processor", None)
    )
    size = dict(getattr(image_processor, "size", None) or {})
    if max_pixels is None or size.keys() != {"longest_edge"}:
        return {}
    return {"size": {"longest_edge": min(size["longest_edge"], max(1, int(max_pixels**0.5)))}}
