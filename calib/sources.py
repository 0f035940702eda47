"""Where calibration rows come from: lists, folders, json files, `datasets`, data loaders, and sets known by a
short name.

A source is reduced to its sampled raw rows, each with its index in the source. Sources with a length are
sampled by a seeded permutation and kept in their order; of streams the first rows are taken. Nothing is
decoded here.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmq.calib.images import IMAGE_SUFFIXES, is_image_path


@dataclass(frozen=True)
class NamedSet:
    """A data set on the hub: where it is, and under which name to read which of its columns."""

    hub_id: str
    split: str
    columns: dict[str, str]
    config: str | None = None


NAMED_SETS: dict[str, NamedSet] = {
    "flickr30k": NamedSet("lmms-lab/flickr30k", "test", {"image": "image", "caption": "caption"}),
    "vqav2": NamedSet(
        "lmms-lab/VQAv2",
        "validation",
        {"image": "image", "question": "question", "multiple_choice_answer": "answer"},
    ),
    "textvqa": NamedSet(
        "lmms-lab/textvqa", "train", {"image": "image", "question": "question", "answers": "answers"}
    ),
    "pile-10k": NamedSet("NeelNanda/pile-10k", "train", {"text": "text"}),
    "ultrachat": NamedSet("HuggingFaceH4/ultrachat_200k", "train_sft", {"messages": "messages"}),
}


@dataclass(frozen=True)
class Source:
    """The sampled raw rows of a source.

    Attributes:
        name: for descriptions and messages.
        rows: (index in the source, raw row).
        folder: what relative image paths are relative to.
    """

    name: str
    rows: list[tuple[int, Any]]
    folder: Path | None = None


def read_source(source: Any, *, n_samples: int, seed: int) -> Source:
    """Take `n_samples` raw rows of any source that `vlmq.calib.load` accepts.

    Raises:
        ValueError: the name or path is unknown, the file is not json, the set cannot be reached.
        TypeError: the source is nothing that rows can be taken from.
    """
    if isinstance(source, str | Path):
        return _read_name(source, n_samples, seed)
    if isinstance(source, Mapping):
        if hasattr(source, "column_names"):
            splits = ", ".join(map(repr, source))
            raise ValueError(f"calibration source is a DatasetDict; give one of its splits: {splits}")
        return Source("one batch or row", [(0, source)])
    if isinstance(source, Image.Image):
        return Source("one image", [(0, source)])
    if isinstance(source, np.ndarray | Tensor):
        return Source(
            f"{type(source).__name__} {tuple(source.shape)}", _sample(_split(source), n_samples, seed)
        )
    name = type(source).__name__
    if isinstance(source, list | tuple):
        if source and isinstance(source[0], Mapping) and {"role", "from"} & source[0].keys():
            source = [source]
        return Source(f"{name} of {len(source)}", _sample(source, n_samples, seed))
    if hasattr(source, "column_names"):
        return Source(name, _sample_dataset(source, n_samples, seed))
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return Source(f"{name} of {len(source)}", _sample(source, n_samples, seed))
    if isinstance(source, Iterable):
        return Source(name, list(enumerate(islice(source, n_samples))))
    raise TypeError(
        f"calibration source: expected images, texts, (image, text) pairs, chat messages, a folder, a .jsonl "
        f"file, a datasets.Dataset, ready batches or a short name ({' '.join(NAMED_SETS)}), got {name}"
    )


def _indices(n_rows: int, n_samples: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n_rows, generator=generator)[:n_samples].tolist())


def _sample(rows: Any, n_samples: int, seed: int) -> list[tuple[int, Any]]:
    return [(i, rows[i]) for i in _indices(len(rows), n_samples, seed)]


def _split(array: np.ndarray | Tensor) -> Any:
    """One image or one row of token ids stands for a list of one."""
    is_ids = isinstance(array, Tensor) and not array.is_floating_point() and array.dtype != torch.uint8
    n_dims_of_row = 1 if is_ids else 3
    if array.ndim == n_dims_of_row or (array.ndim == 2 and not is_ids):
        return [array]
    return array


def _sample_dataset(dataset: Any, n_samples: int, seed: int) -> list[tuple[int, Any]]:
    """Rows of a `datasets` set with images left undecoded, so that a corrupt one is found by its index.

    A transform that was set on the set is kept; it decodes images itself.
    """
    if hasattr(dataset, "__len__") and dataset.format["type"] == "custom":
        return _sample(dataset, n_samples, seed)
    if hasattr(dataset, "__len__"):
        raw = dataset.with_format("arrow")
        return [(i, raw[i].to_pylist()[0]) for i in _indices(len(dataset), n_samples, seed)]
    if dataset.features is not None:
        dataset = dataset.decode(False)
    return list(enumerate(islice(dataset, n_samples)))


def _read_name(source: str | Path, n_samples: int, seed: int) -> Source:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, n_samples, seed)
    if path.is_file():
        if path.suffix in (".jsonl", ".json"):
            return _read_json(path, n_samples, seed)
        if is_image_path(path.name):
            return Source(str(source), [(0, path)])
        raise ValueError(
            f"calibration file '{path}': expected .jsonl, .json or an image, got {path.suffix!r}"
        )
    if str(source) in NAMED_SETS:
        return Source(str(source), list(enumerate(_stream_named(str(source), n_samples))))
    raise ValueError(
        f"calibration source {str(source)!r} is neither a file, a folder, nor a known set; known sets: "
        f"{' '.join(NAMED_SETS)}; for another set of the hub give datasets.load_dataset(...) itself"
    )


def _read_folder(folder: Path, n_samples: int, seed: int) -> Source:
    """The images of a folder, at any depth; or the rows of its metadata.jsonl, if it has one."""
    if (folder / "metadata.jsonl").is_file():
        return _read_json(folder / "metadata.jsonl", n_samples, seed)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"calibration folder '{folder}' holds no image ({known}) and no metadata.jsonl")
    return Source(str(folder), _sample(paths, n_samples, seed))


def _read_json(path: Path, n_samples: int, seed: int) -> Source:
    """A .jsonl file (a row per line; blank lines are skipped) or a .json file that holds a list of rows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = _parse(text, f"calibration file '{path}'")
        if not isinstance(rows, list):
            raise ValueError(f"calibration file '{path}': expected a list of rows, got {type(rows).__name__}")
        return Source(str(path), _sample(rows, n_samples, seed), path.parent)
    lines = [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
    picked = [lines[i] for i in _indices(len(lines), n_samples, seed)]
    parsed = [(i - 1, _parse(line, f"calibration file '{path}', line {i}")) for i, line in picked]
    return Source(str(path), parsed, path.parent)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid json: {error}") from error


def _stream_named(name: str, n_samples: int) -> Iterator[dict[str, Any]]:
    # Here, not above: `datasets` takes a second to import and most sources do not need it.
    from datasets import load_dataset

    known = NAMED_SETS[name]
    try:
        stream = load_dataset(known.hub_id, known.config, split=known.split, streaming=True).decode(False)
        for row in islice(stream, n_samples):
            yield {to: row[column] for column, to in known.columns.items()}
    except (OSError, KeyError) as error:
        raise ValueError(
            f"calibration set {name!r} (hub data set {known.hub_id}, split {known.split}) could not be read: "
            f"{error}; without a hub, give a folder of images, a .jsonl file or a datasets.Dataset"
        ) from error
