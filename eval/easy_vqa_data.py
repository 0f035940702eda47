"""Rows of easy-vqa: pictures of one shape and the questions asked about them.

The PyPI package easy-vqa (MIT) holds generated data: 64 x 64 pictures of one coloured shape on a light ground,
questions from 107 sentences, 13 one-word answers. A row is `{"image", "question", "answer"}`.

Two sources give the same rows:

* `load_easy_vqa`: the whole data set, from the `easy-vqa` package (a development dependency);
* `load_shapes`: the fixed rows that ship with vlmq in `assets/shapes-data/shapes.zip` (calibration rows
  from the train split, test rows from the test split), which need neither the package nor a network.

The zip holds `calibration.jsonl`, `test.jsonl` (image, question, answer per line) and the pictures as PNG.
"""

import io
import json
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypedDict

from PIL import Image

import vlmq

QUESTION_KINDS = ("color", "shape", "presence", "absence")
PARTS = ("calibration", "test")
_ASSETS = Path(vlmq.__file__).parent / "assets"


class Row(TypedDict):
    """One question about one picture; `image` is 64 x 64 RGB, rows about one picture share the object."""

    image: Image.Image
    question: str
    answer: str


def demo_model_path() -> Path:
    """Folder of the small vision-language model that ships with vlmq (load it with the Auto classes)."""
    return _ASSETS / "shapes-vlm"


def shapes_path() -> Path:
    """The zip file of the rows that ship with vlmq."""
    return _ASSETS / "shapes-data" / "shapes.zip"


def question_kind(question: str) -> str:
    """Kind of a question: what it asks for, and for yes/no questions whether it is negated.

    Returns:
        "color", "shape", "presence" (yes if the thing is there) or "absence" (yes if it is not).
    """
    words = question.rstrip("?").split()
    if words[0] == "what":
        return "color" if "color" in words else "shape"
    return "absence" if "not" in words or "no" in words else "presence"


def load_easy_vqa(split: Literal["train", "test"]) -> list[Row]:
    """All rows of a split of the `easy-vqa` package, in its order.

    Args:
        split: "train" (4000 pictures, 38575 questions) or "test" (1000 pictures, 9673 questions).

    Raises:
        ValueError: the split is unknown.
        ModuleNotFoundError: the package is not installed.
    """
    return [row for _, row in indexed_rows(split)]


def load_shapes(part: Literal["calibration", "test"], *, n_rows: int | None = None) -> list[Row]:
    """The rows that ship with vlmq, in their fixed order, which mixes the kinds of question evenly.

    Args:
        part: "calibration" (pictures of the train split) or "test" (pictures of the test split).
        n_rows: take the first rows only; None takes all.

    Raises:
        ValueError: the part is unknown, or more rows are asked for than there are.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} of the shipped shapes is unknown; known: {' '.join(PARTS)}")
    with zipfile.ZipFile(shapes_path()) as archive:
        lines = archive.read(f"{part}.jsonl").decode().splitlines()
        if n_rows is not None and not 0 <= n_rows <= len(lines):
            raise ValueError(f"n_rows must be 0 to {len(lines)} for the shipped {part} rows, got {n_rows}")
        rows: list[Row] = []
        for line in lines[:n_rows]:
            record = json.loads(line)
            image = Image.open(io.BytesIO(archive.read(record["image"]))).convert("RGB")
            rows.append({"image": image, "question": record["question"], "answer": record["answer"]})
    return rows


def as_messages(row: Row, *, with_answer: bool = True) -> list[dict[str, Any]]:
    """Chat messages of a row: a user turn (picture, question) and, if asked for, the assistant's answer.

    The picture itself is in the message, so `processor.apply_chat_template(messages, tokenize=True,
    return_dict=True)` makes model inputs of it; pass `add_generation_prompt=True` when there is no answer.
    """
    user = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": user}]
    if with_answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]})
    return messages


def write_shapes(path: Path, *, n_calibration: int = 256, n_test: int = 512, seed: int = 0) -> None:
    """Write the shipped zip file from the `easy-vqa` package; the same arguments write the same bytes.

    Every kind of question gets the same number of rows and no picture is used twice.
    """
    chosen = {"calibration": ("train", n_calibration), "test": ("test", n_test)}
    with zipfile.ZipFile(path, "w") as archive:
        for part, (split, n_rows) in chosen.items():
            records = []
            for image_id, row in _stratified(indexed_rows(split), n_rows, seed):
                name = f"{part}/{image_id}.png"
                buffer = io.BytesIO()
                row["image"].save(buffer, format="PNG", optimize=True)
                archive.writestr(zipfile.ZipInfo(name), buffer.getvalue())
                records.append({"image": name, "question": row["question"], "answer": row["answer"]})
            lines = "".join(json.dumps(record) + "\n" for record in records)
            archive.writestr(zipfile.ZipInfo(f"{part}.jsonl"), lines, zipfile.ZIP_DEFLATED)


def indexed_rows(split: str) -> list[tuple[int, Row]]:
    """Rows of a split of the package with the number of their picture."""
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} of easy-vqa is unknown; known: train test")
    package = _easy_vqa()
    is_train = split == "train"
    paths = package.get_train_image_paths() if is_train else package.get_test_image_paths()
    images = {image_id: Image.open(path).convert("RGB") for image_id, path in paths.items()}
    questions = package.get_train_questions() if is_train else package.get_test_questions()
    return [
        (image_id, {"image": images[image_id], "question": question, "answer": answer})
        for question, answer, image_id in zip(*questions, strict=True)
    ]


def _easy_vqa() -> ModuleType:
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        message = "the whole easy-vqa data set needs the package easy-vqa: pip install easy-vqa"
        raise ModuleNotFoundError(f"{message} (load_shapes reads the shipped rows without it)") from error
    return easy_vqa


def _stratified(rows: Sequence[tuple[int, Row]], n_rows: int, seed: int) -> list[tuple[int, Row]]:
    """Choose rows, the kinds of question in turn, each about a picture not used before."""
    generator = random.Random(seed)
    waiting: dict[str, list[tuple[int, Row]]] = {kind: [] for kind in QUESTION_KINDS}
    for image_id, row in generator.sample(rows, len(rows)):
        waiting[question_kind(row["question"])].append((image_id, row))
    chosen: list[tuple[int, Row]] = []
    used: set[int] = set()
    while len(chosen) < n_rows:
        queue = waiting[QUESTION_KINDS[len(chosen) % len(QUESTION_KINDS)]]
        image_id, row = queue.pop()
        if image_id not in used:
            used.add(image_id)
            chosen.append((image_id, row))
    return chosen
