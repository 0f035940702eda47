"""Calibration data for any family: load it through the model's own processor, with the kind of each token.

`load` samples raw rows (sources.py), normalises them to chat messages (messages.py), checks every sampled row
and its images, then encodes them (encode.py). A row that cannot be used is an error that names its index; all
bad rows are reported at once, before anything is quantized. A row whose images do not fit into `max_tokens`
is dropped and counted: an image is never cut. In memory at the end: the encoded batches, mostly 4 bytes x
pixels of float32 per image.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from torch import nn

from vlmq.calib.batches import collate_text, is_ready, processor_image_token_ids, ready_batch
from vlmq.calib.calibration_set import CalibrationSet
from vlmq.calib.encode import (
    batch_kinds,
    caption_of,
    check_row,
    cut,
    encode_row,
    encode_together,
)
from vlmq.calib.images import open_image
from vlmq.calib.messages import Row, read_row
from vlmq.calib.prompts import is_dual_encoder
from vlmq.calib.sources import read_source
from vlmq.calib.tokens import CalibBatch

logger = logging.getLogger(__name__)

MAX_LISTED = 10


def load(
    source: Any,
    processor: Any,
    *,
    n_samples: int = 128,
    max_tokens: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    max_pixels: int | None = None,
) -> CalibrationSet:
    """Build a calibration set.

    Args:
        source: images (PIL, paths, arrays), a folder of images, (image, text) tuples, mappings with columns
            of usual names, chat messages, a .jsonl or .json file (image paths relative to it), a `datasets`
            set (also streaming), plain texts, ready batches or token ids or a DataLoader of them, or a short
            name (`NAMED_SETS`).
        processor: the model's AutoProcessor; a tokenizer for a language model, an image processor for a
            vision model.
        n_samples: rows to sample by a seeded permutation; of streams the first ones.
        max_tokens: rows are cut here; a row is dropped if that would cut an image. Ready mappings stay as
            they are.
        batch_size: rows per batch. Rows with and without images do not share a batch. A contrastive loss of a
            dual encoder needs more than one.
        seed: of the sampling.
        max_pixels: shrink larger images, their aspect ratio kept, before the processor sees them.

    Returns:
        The batches, on the CPU.

    Raises:
        ValueError: nothing to calibrate on, or bad rows; the message lists up to ten with their index.
        TypeError: the source is nothing that rows can be taken from, or the processor is a model.
    """
    if isinstance(processor, nn.Module):
        raise TypeError(
            f"processor: expected the model's AutoProcessor, got the model {type(processor).__name__}"
        )
    for name, value in (("n_samples", n_samples), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels: expected None or at least 1, got {max_pixels}")
    picked = read_source(source, n_samples=n_samples, seed=seed)
    if not picked.rows:
        raise ValueError(
            f"calibration source {picked.name} is empty: give at least one image, text or chat "
            f"(128 rows are usual)"
        )
    if is_ready(picked.rows[0][1]):
        batches = _load_ready(picked.rows, processor, n_samples, max_tokens, batch_size)
        return CalibrationSet(tuple(batches), picked.name)

    rows = _check_rows(picked.rows, picked.name, picked.folder, processor)
    if is_dual_encoder(processor) and not any(caption_of(row) for row in rows):
        logger.warning("%s has no captions: the text encoder sees one fixed caption only", picked.name)
    open_row = _Opener(picked.folder, max_pixels)
    batches, n_dropped = _encode(rows, picked.name, processor, open_row, max_tokens, batch_size)
    if not batches:
        raise ValueError(
            f"all {n_dropped} rows of calibration source {picked.name} were dropped: their images need more "
            f"than max_tokens={max_tokens} tokens; raise max_tokens or lower max_pixels"
        )
    calibration = CalibrationSet(tuple(batches), picked.name, n_dropped)
    logger.info("calibration set: %s", calibration.description)
    return calibration


@dataclass(frozen=True)
class _Opener:
    """Opens the images of a row."""

    folder: Path | None
    max_pixels: int | None

    def __call__(self, row: Row) -> list[Any]:
        return [open_image(image, folder=self.folder, max_pixels=self.max_pixels) for image in row.images]


def _load_ready(
    numbered: Iterable[tuple[int, Any]], processor: Any, n_samples: int, max_tokens: int, batch_size: int
) -> list[CalibBatch]:
    """Ready mappings as they are, until there are n_samples rows; token ids are cut and stacked."""
    image_ids = processor_image_token_ids(processor)
    pad = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None) or 0
    batches: list[CalibBatch] = []
    waiting: list[CalibBatch] = []
    n_rows = 0
    for index, raw in numbered:
        if n_rows >= n_samples:
            break
        batch = ready_batch(raw, image_ids, f"batch {index}")
        n_rows += len(batch.kinds)
        if batch.inputs.keys() != {"input_ids"}:
            batches.append(batch)
            continue
        waiting += [
            CalibBatch({"input_ids": ids[None, :max_tokens]}, kinds[None, :max_tokens])
            for ids, kinds in zip(batch.inputs["input_ids"], batch.kinds, strict=True)
        ]
    batches += [collate_text(group, pad) for group in _groups(waiting, batch_size)]
    return batches


def _check_rows(
    numbered: Iterable[tuple[int, Any]], name: str, folder: Path | None, processor: Any
) -> list[Row]:
    """Normalise all rows and decode all images once, so that every bad row is known before work starts."""
    rows: list[Row] = []
    problems: list[tuple[int, str]] = []
    n_rows = 0
    for index, raw in numbered:
        n_rows += 1
        try:
            row = read_row(index, raw)
            check_row(row, processor)
            for i, image in enumerate(row.images):
                opened = open_image(image, folder=folder)
                if isinstance(image, str) and image.startswith(("http://", "https://")):
                    row.images[i] = opened
            rows.append(row)
        except ValueError as error:
            problems.append((index, str(error)))
    _raise_problems(problems, n_rows, name)
    return rows


def _encode(
    rows: Sequence[Row], name: str, processor: Any, open_row: _Opener, max_tokens: int, batch_size: int
) -> tuple[list[CalibBatch], int]:
    """Encode rows one by one, then in batches; returns the batches and how many rows were dropped."""
    limits = {"max_tokens": max_tokens, "max_pixels": open_row.max_pixels}
    pad = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None) or 0
    problems: list[tuple[int, str]] = []
    with_images: list[tuple[Row, CalibBatch]] = []
    texts: list[CalibBatch] = []
    batches: list[CalibBatch] = []
    n_dropped = 0
    for row in rows:
        try:
            whole = encode_row(row, open_row(row), processor, **limits)
        except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
            problems.append((row.index, f"{type(processor).__name__} refused it: {error}"))
            continue
        batch = cut(whole, max_tokens)
        if batch is None:
            n_dropped += 1
            logger.info("row %d dropped: its images need more than %d tokens", row.index, max_tokens)
        elif not row.images:
            texts.append(batch)
        elif batch_size == 1 or batch is not whole:
            batches.append(batch)
        else:
            # The pixels are made again for the whole batch: keep only what tells tokens apart.
            ids_only = {k: v for k, v in batch.inputs.items() if k == "input_ids"}
            with_images.append((row, CalibBatch(ids_only, batch.kinds)))
    _raise_problems(problems, len(rows), name)
    for group in _groups(with_images, batch_size):
        inputs = encode_together(
            [row for row, _ in group], [open_row(row) for row, _ in group], processor, **limits
        )
        batches.append(CalibBatch(inputs, batch_kinds(inputs, [single for _, single in group])))
    return batches + [collate_text(group, pad) for group in _groups(texts, batch_size)], n_dropped


def _groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _raise_problems(problems: Sequence[tuple[int, str]], n_rows: int, name: str) -> None:
    if not problems:
        return
    by_text: dict[str, list[int]] = {}
    for index, text in problems[:MAX_LISTED]:
        by_text.setdefault(text, []).append(index)
    lines = [
        f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}: {text}"
        for text, rows in by_text.items()
    ]
    if len(problems) > MAX_LISTED:
        lines.append(f"and {len(problems) - MAX_LISTED} more")
    raise ValueError(
        f"{len(problems)} of {n_rows} rows of calibration source {name} cannot be used; mend or remove "
        "them:\n  " + "\n  ".join(lines)
    )
