"""Turn a raw row of any usual shape into one `Row`: chat messages and the images that they refer to, or plain
text.

What becomes of a row:

| row | user turn | assistant turn |
|---|---|---|
| image | image, "Describe the image." | - |
| (image, text), image + text or caption column | image, "Describe the image." | the text |
| question column | images, question | the answer, if any |
| text + answer columns | images, text | the answer |
| messages, conversations | as they are; `<image>` in a text is an image's place | as they are |
| a string, a text column alone | plain text, no chat | - |

A list of captions or answers stands for several annotators: the first is taken.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmq.calib.images import is_image

IMAGE_COLUMNS = ("image", "images", "img", "image_path", "file_name", "jpg", "jpeg", "png")
QUESTION_COLUMNS = ("question", "prompt", "instruction", "query")
ANSWER_COLUMNS = ("answer", "multiple_choice_answer", "answers", "response", "output")
CAPTION_COLUMNS = ("caption", "captions")
TEXT_COLUMNS = ("text",)
CHAT_COLUMNS = ("messages", "conversations", "conversation")
COLUMNS = (
    *IMAGE_COLUMNS,
    *TEXT_COLUMNS,
    *CAPTION_COLUMNS,
    *QUESTION_COLUMNS,
    *ANSWER_COLUMNS,
    *CHAT_COLUMNS,
)
DEFAULT_QUESTION = "Describe the image."
PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SOURCE_KEYS = ("image", "url", "path", "base64", "image_url")

Part = dict[str, Any]
Message = dict[str, Any]


@dataclass
class Row:
    """One calibration row.

    Attributes:
        index: its place in the source.
        messages: chat turns `{"role", "content": [parts]}`; an image part is a bare `{"type": "image"}`.
        images: what `open_image` takes, in the order of the image parts.
        text: plain text to be tokenized as it is; then there are no messages and no images.
    """

    index: int
    messages: list[Message] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    text: str | None = None


def read_row(index: int, raw: Any) -> Row:
    """Normalise one raw row.

    Args:
        index: the row's place in the source.
        raw: an image, a string, a tuple (image, text) or (image, question, answer), a list of chat messages,
            or a mapping with columns of usual names.

    Raises:
        ValueError: the row cannot be used; the text says why, without the index.
    """
    if isinstance(raw, str) and not is_image(raw):
        return Row(index, text=_require_text(raw, "text"))
    if isinstance(raw, tuple):
        return _read_tuple(index, raw)
    if isinstance(raw, list) and raw and all(isinstance(turn, Mapping) for turn in raw):
        return _read_chat(index, raw, [])
    if is_image(raw):
        return Row(index, [_user([raw], DEFAULT_QUESTION)], [raw])
    if isinstance(raw, Mapping):
        return _read_columns(index, raw)
    raise ValueError(
        f"expected an image, a text, a tuple (image, text), chat messages or a mapping with columns, "
        f"got {type(raw).__name__}"
    )


def _read_tuple(index: int, raw: tuple) -> Row:
    if len(raw) == 2 and is_image(raw[1]) and not is_image(raw[0]):
        raw = (raw[1], raw[0])
    if len(raw) not in (2, 3) or not (is_image(raw[0]) or raw[0] is None or isinstance(raw[0], list)):
        kinds = ", ".join(type(value).__name__ for value in raw)
        raise ValueError(f"expected (image, text) or (image, question, answer), got ({kinds})")
    names = ("image", "text") if len(raw) == 2 else ("image", "question", "answer")
    return _read_columns(index, dict(zip(names, raw, strict=True)))


def _read_columns(index: int, raw: Mapping[str, Any]) -> Row:
    found = {name: raw[name] for name in COLUMNS if name in raw}
    if not found:
        raise ValueError(f"no known column among {', '.join(map(str, raw))}; understood: {' '.join(COLUMNS)}")
    image_column = next((name for name in IMAGE_COLUMNS if name in found), None)
    images = _as_list(found[image_column]) if image_column else []

    chat = _first_value(found, CHAT_COLUMNS)
    if chat is not None:
        return _read_chat(index, chat, images)
    text, text_column = _first_text(found, TEXT_COLUMNS)
    caption, caption_column = _first_text(found, CAPTION_COLUMNS)
    question, question_column = _first_text(found, QUESTION_COLUMNS)
    answer, answer_column = _first_text(found, ANSWER_COLUMNS)
    if question is None and answer is not None:
        question, question_column, text = text, text_column, None
    elif question is None:
        if image_column and not images:
            raise ValueError(f"column '{image_column}' holds no image")
        if not images and text is not None:
            return Row(index, text=_require_text(text, f"column '{text_column}'"))
    if answer is None:
        answer, answer_column = (caption, caption_column) if caption is not None else (text, text_column)
    if not images and question is None:
        raise ValueError(f"columns {', '.join(found)} hold neither an image nor a question")

    turns: list[Message] = []
    question = (
        DEFAULT_QUESTION if question is None else _require_text(question, f"column '{question_column}'")
    )
    turns.append({"role": "user", "content": question})
    if answer is not None:
        turns.append({"role": "assistant", "content": _require_text(answer, f"column '{answer_column}'")})
    return _read_chat(index, turns, images)


def _read_chat(index: int, turns: Any, images: list[Any]) -> Row:
    """Chat turns in the role/content or the from/value form; `images` fill the places that name no source."""
    if not isinstance(turns, Sequence) or not turns:
        raise ValueError("the conversation is empty")
    row, waiting = Row(index), list(images)
    for number, turn in enumerate(turns):
        role = turn.get("role") or turn.get("from") if isinstance(turn, Mapping) else None
        if role is None:
            raise ValueError(
                f"message {number} has no role (expected 'role' and 'content', or 'from' and 'value')"
            )
        content: list[Part] = []
        for part in _parts(turn.get("content", turn.get("value"))):
            if part["type"] == "image":
                source = part.get("image", waiting.pop(0) if "image" not in part and waiting else None)
                if source is None:
                    raise ValueError(f"message {number} refers to an image that the row does not have")
                row.images.append(source)
                part = {"type": "image"}
            content.append(part)
        row.messages.append({"role": ROLES.get(role, role), "content": content})
    if waiting and row.images:
        raise ValueError(f"the row has {len(waiting)} image(s) more than its text refers to")
    if waiting:
        user = next((m for m in row.messages if m["role"] == "user"), row.messages[0])
        user["content"][:0] = [{"type": "image"}] * len(waiting)
        row.images = waiting
    if not row.images and not any(text_of(message) for message in row.messages):
        raise ValueError("the conversation holds no text")
    last = row.messages[-1]
    if last["role"] == "assistant" and not text_of(last):
        raise ValueError("the assistant's last message is empty")
    return row


def _parts(content: Any) -> list[Part]:
    """A message's parts: `{"type": "text", "text"}` or `{"type": "image"}`, with an "image" where inline."""
    if content is None:
        return []
    if isinstance(content, str):
        return _split_placeholders(content)
    parts: list[Part] = []
    for raw in content:
        part = (
            {key: value for key, value in raw.items() if value is not None}
            if isinstance(raw, Mapping)
            else {}
        )
        kind = "image" if part.get("type") == "image_url" else part.get("type")
        if isinstance(raw, str):
            parts += _split_placeholders(raw)
        elif kind == "text":
            parts += _split_placeholders(part.get("text", ""))
        elif kind == "image":
            sources = [_inline_image(key, part[key]) for key in SOURCE_KEYS if key in part]
            parts.append({"type": "image", **({"image": sources[0]} if sources else {})})
        else:
            raise ValueError(f"content of type {kind!r} cannot be calibrated on; only text and image can")
    return parts


def _inline_image(key: str, source: Any) -> Any:
    if key == "image_url" and isinstance(source, Mapping):
        source = source.get("url")
    if key == "base64" and isinstance(source, str):
        try:
            return base64.b64decode(source.rpartition(",")[2], validate=True)
        except ValueError as error:
            raise ValueError(f"the base64 text of an image is corrupt: {error}") from error
    return source


def _split_placeholders(text: str) -> list[Part]:
    """`"<image>\\nWhat is it?"` is an image part, then a text part."""
    parts: list[Part] = []
    for piece in re.split(f"(\\s*{PLACEHOLDER}\\s*)", text):
        if piece.strip() == PLACEHOLDER:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def text_of(message: Message) -> str:
    """The text of a message's parts, stripped."""
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _user(images: list[Any], text: str) -> Message:
    return {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]}


def _as_list(value: Any) -> list[Any]:
    """An image column holds one image, a list of them, or None."""
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if v is not None and not (isinstance(v, str) and not v.strip())]


def _first_value(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _first_text(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str | None, str]:
    """The first column of `names` with a value, as a string, and its name."""
    for name in names:
        value = row.get(name)
        while isinstance(value, list | tuple | Mapping):
            if isinstance(value, Mapping):
                value = _first_value(value, ("answer", "text", "raw"))
            else:
                value = value[0] if value else ""
        if value is not None:
            return str(value), name
    return None, names[0]


def _require_text(text: str, what: str) -> str:
    if not text.strip():
        raise ValueError(f"{what} is empty")
    return text
