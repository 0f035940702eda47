"""What kind of processor it is, and chats through it: by its template, or as lines with image tokens.

`render` functions give the text that a processor tokenizes, `encode_*` functions the model's inputs.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlmq.calib.messages import Message, text_of

GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")

Images = list[Image.Image]


def is_tokenizer(processor: Any) -> bool:
    """Whether there is no image processor at all."""
    return isinstance(processor, PreTrainedTokenizerBase)


def is_image_processor(processor: Any) -> bool:
    """Whether there is no tokenizer at all."""
    return not is_tokenizer(processor) and getattr(processor, "tokenizer", None) is None


def is_dual_encoder(processor: Any) -> bool:
    """Whether image and text go in side by side: no chat template, and no token that stands for an image."""
    return (
        not is_tokenizer(processor)
        and not is_image_processor(processor)
        and not template_of(processor)
        and all(getattr(processor, name, None) is None for name in ("image_token", "image_token_id"))
    )


def template_of(processor: Any) -> str | None:
    """The chat template, the default one of several."""
    template = getattr(processor, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def marks_answers(processor: Any) -> bool:
    """Whether the template tags what the assistant says, and the tokenizer can map characters to tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    has_tags = GENERATION_TAG.search(template_of(processor) or "") is not None
    return has_tags and bool(getattr(tokenizer, "is_fast", False))


def encode_chats(
    chats: Sequence[Sequence[Message]],
    images: Sequence[Images],
    processor: Any,
    options: dict[str, Any],
    *,
    assistant_mask: bool = False,
    add_generation_prompt: bool = False,
) -> dict[str, Any]:
    """Chats through the chat template.

    Args:
        chats: messages with bare image parts.
        images: the opened images of each chat, in the order of its image parts.
        processor: with a chat template.
        options: for the image processor.
        assistant_mask: also return "assistant_masks", from the template's generation tags.
        add_generation_prompt: open the assistant's turn at the end.

    Returns:
        The model's inputs, padded.
    """
    chats = [_with_images(chat, row, processor) for chat, row in zip(chats, images, strict=True)]
    common = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "add_generation_prompt": add_generation_prompt,
        "return_assistant_tokens_mask": assistant_mask,
    }
    if is_tokenizer(processor):
        return dict(processor.apply_chat_template(chats, padding=len(chats) > 1, **common))
    call_options = {"padding": len(chats) > 1, **({"images_kwargs": options} if options else {})}
    return dict(processor.apply_chat_template(chats, processor_kwargs=call_options, **common))


def encode_texts(
    chats: Sequence[Sequence[Message]], images: Sequence[Images], processor: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Chats as lines of text with image tokens, for a processor without a chat template.

    Args:
        chats, images, processor, options: as for `encode_chats`.

    Returns:
        The model's inputs, padded; with "labels" where the processor itself tells answers apart.
    """
    render = renderer(processor)
    pictures = {"images": [list(row) for row in images]} if any(images) else {}
    answers = {}
    takes_suffix = any(c.__name__ == "PaliGemmaProcessor" for c in type(processor).__mro__)
    if takes_suffix and all(chat[-1]["role"] == "assistant" for chat in chats):
        # The answer is a suffix with causal attention, told apart by the processor itself.
        answers = {"suffix": [text_of(chat[-1]) for chat in chats]}
        chats = [chat[:-1] for chat in chats]
    call_options = {"padding": len(chats) > 1, "return_tensors": "pt", **pictures, **answers, **options}
    return dict(processor(text=[render(chat, False) for chat in chats], **call_options))


def _with_images(chat: Sequence[Message], images: Images, processor: Any) -> list[Message]:
    """The chat with opened images in their places; for a tokenizer, with plain strings as contents."""
    if is_tokenizer(processor):
        return [{"role": m["role"], "content": text_of(m)} for m in chat]
    left = iter(images)
    return [
        {
            "role": m["role"],
            "content": [
                {**part, "image": next(left)} if part["type"] == "image" else part for part in m["content"]
            ],
        }
        for m in chat
    ]


def renderer(processor: Any) -> Callable[[Sequence[Message], bool], str]:
    """A function from a chat to the text to tokenize; its second argument opens the assistant's turn."""
    if template_of(processor):

        def by_template(chat: Sequence[Message], open_answer: bool) -> str:
            plain = [{"role": m["role"], "content": text_of(m)} for m in chat]
            messages = plain if is_tokenizer(processor) else list(chat)
            return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)

        return by_template
    image_token = getattr(processor, "image_token", None) or ""

    def by_lines(chat: Sequence[Message], open_answer: bool) -> str:
        lines = [
            "".join(image_token if part["type"] == "image" else part["text"] for part in m["content"])
            for m in chat
        ]
        return "\n".join(lines) + ("\n" if open_answer else "")

    return by_lines


def plain_tokenizer(processor: Any) -> Callable[[str], list[int]]:
    """A function from text to token ids, without special tokens of the tokenizer's own."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
