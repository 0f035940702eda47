"""Images with labels or captions: a folder of class folders, a .jsonl file, a `datasets` set, or a set of the hub.

| source | label | captions |
|---|---|---|
| folder | the folder directly below it that holds the image | column of its metadata.jsonl |
| .jsonl, .json | column `label`, `labels`, `class`, `category`, `fine_label` | `caption(s)`, `text(s)`, `sentences` |
| datasets.Dataset | same columns; numbers stand for the names of a ClassLabel | same columns |
| "owner/name" or "owner/name:split" | as a datasets.Dataset | as a datasets.Dataset |

A list of captions is several captions of one image.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmq.calib.images import IMAGE_SUFFIXES, open_image
from vlmq.calib.messages import IMAGE_COLUMNS
from vlmq.calib.sources import Source, read_source

LABEL_COLUMNS = ("label", "labels", "class", "category", "fine_label")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentences")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_ALL_ROWS = 2**31


@dataclass(frozen=True)
class LabeledImages:
    """Images and the class of each: `labels[i]` is the place in `classes` of the class of `images[i]`."""

    images: tuple[Image.Image, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class CaptionedImages:
    """Images and the captions of each, one or more."""

    images: tuple[Image.Image, ...]
    captions: tuple[tuple[str, ...], ...]


def load_labeled(source: Any, *, n_images: int | None = None, seed: int = 0) -> LabeledImages:
    """Read images with labels.

    Args:
        source: see the module.
        n_images: take so many, drawn by the seed; None takes all.
        seed: of the draw.

    Raises:
        ValueError: no such source, no row, a row without image or label, an image that cannot be read, or fewer
            than two classes; the message names the row.
    """
    # The classes are those of the whole source, so that a draw is as hard as the whole.
    source = _opened(source)
    names = _class_names(source)
    found = _read(source, _ALL_ROWS if n_images is None or names is None else n_images, seed)
    labels = []
    for index, raw in found.rows:
        label = _column(raw, LABEL_COLUMNS, f"row {index} of {found.name}", "a label")
        labels.append(names[label] if names is not None and isinstance(label, int) else str(label))
    classes = tuple(names or sorted(set(labels)))
    if len(classes) < 2:
        raise ValueError(f"{found.name}: expected at least two classes to tell apart, found {list(classes)}")
    drawn = random.Random(seed).sample(range(len(labels)), min(n_images or len(labels), len(labels)))
    places = {name: place for place, name in enumerate(classes)}
    images = tuple(_image(found.rows[i], found) for i in sorted(drawn))
    return LabeledImages(images, tuple(places[labels[i]] for i in sorted(drawn)), classes)


def load_captioned(source: Any, *, n_images: int | None = None, seed: int = 0) -> CaptionedImages:
    """Read images with captions; arguments and errors as for `load_labeled`."""
    found = _read(_opened(source), _ALL_ROWS if n_images is None else n_images, seed)
    images, captions = [], []
    for index, raw in found.rows:
        where = f"row {index} of {found.name}"
        texts = _column(raw, CAPTION_COLUMNS, where, "a caption")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where}: expected captions that are no empty texts, got {texts!r}")
        images.append(_image((index, raw), found))
        captions.append(tuple(texts))
    if len(images) < 2:
        raise ValueError(f"{found.name}: retrieval needs at least two images, found {len(images)}")
    return CaptionedImages(tuple(images), tuple(captions))


def _opened(source: Any) -> Any:
    """The rows of a folder of class folders, the set of the hub that a name stands for, other sources as they are."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir() and not (path / "metadata.jsonl").is_file():
            return _class_folders(path)
        if not path.exists():
            return _from_hub(str(source))
    return source


def _class_names(source: Any) -> list[str] | None:
    """The names of the classes that a `datasets` set knows."""
    features = getattr(source, "features", None) or {}
    found = [features[c].names for c in LABEL_COLUMNS if getattr(features.get(c), "names", None)]
    return list(found[0]) if found else None


def _read(source: Any, n_images: int, seed: int) -> Source:
    found = read_source(source, n_samples=n_images, seed=seed)
    if not found.rows:
        raise ValueError(f"{found.name} is empty: expected rows with an image and a label or caption")
    return found


def _class_folders(folder: Path) -> list[dict[str, Any]]:
    rows = [
        {"image": path, "label": path.relative_to(folder).parts[0]}
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.parent != folder
    ]
    if not rows:
        raise ValueError(
            f"folder '{folder}' holds no images in folders of their classes, and no metadata.jsonl"
        )
    return rows


def _from_hub(name: str) -> Any:
    """A set of the hub, its test split unless the name ends in ":split"."""
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is neither a folder, nor a file, nor the name of a data set as owner/name:split"
        )
    # Here, not above: `datasets` takes a second to import and most sources do not need it.
    from datasets import load_dataset

    hub_id, _, split = name.partition(":")
    try:
        return load_dataset(hub_id, split=split or "test")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data set {name!r} is no path here and cannot be read from the hub: {error}"
        ) from error


def _column(raw: Any, columns: tuple[str, ...], where: str, what: str) -> Any:
    if isinstance(raw, Mapping):
        for column in columns:
            if raw.get(column) is not None:
                return raw[column]
    found = ", ".join(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
    raise ValueError(f"{where}: expected {what} in a column of {', '.join(columns)}; found {found}")


def _image(row: tuple[int, Any], source: Source) -> Image.Image:
    index, raw = row
    where = f"row {index} of {source.name}"
    value = _column(raw, IMAGE_COLUMNS, where, "an image")
    try:
        return open_image(value, folder=source.folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error
