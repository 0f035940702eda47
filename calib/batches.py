"""Ready model inputs to calibration batches: what each token is, and which inputs the model's forward takes.

Kinds are read off the inputs in this order, later ones over earlier ones: text; answer where `labels` is not
-100; image where the token id is a placeholder of visual features (image or video), or, where no such id is
known, where `mm_token_type_ids` says so; padding where `attention_mask` is 0. Without an attention mask every
token counts, as the model attends to it.
"""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch

logger = logging.getLogger(__name__)

IMAGE_ID_NAMES = (
    "image_token_id",
    "image_token_index",
    "img_context_token_id",
    "video_token_id",
    "video_token_index",
    "video_context_token_id",
)
IGNORED_LABEL = -100
PICTURE_NAMES = ("pixel_values", "flattened_patches")
MODEL_INPUT_NAMES = frozenset({"input_ids", "inputs_embeds", *PICTURE_NAMES})


def as_batches(calib_data: Any, model: nn.Module) -> list[CalibBatch]:
    """Read any ready calibration data as batches for `model`; nothing is moved to another device.

    Args:
        calib_data: a CalibrationSet, a batch (mapping of tensors) or an iterable of batches such as a list or
            a DataLoader, token ids (n_rows, n_tokens), or an iterable of token ids. Labels become kinds and
            leave the inputs.
        model: its config names the image tokens, its forward's signature the inputs that it takes.

    Raises:
        ValueError: there is no batch, a batch has no token or shapes that do not fit, or the model takes no
            images.
        TypeError: the data is not ready (images, texts, paths): `vlmq.calib.load` makes it so.
    """
    image_ids = config_image_token_ids(getattr(model, "config", None))
    if isinstance(calib_data, Mapping | CalibBatch):
        calib_data = [calib_data]
    elif isinstance(calib_data, Tensor | np.ndarray):
        calib_data = list(torch.as_tensor(calib_data).reshape(-1, 1, calib_data.shape[-1]))
    if isinstance(calib_data, str | bytes) or not isinstance(calib_data, Iterable):
        raise TypeError(_not_ready("calibration data", calib_data))
    batches = [ready_batch(raw, image_ids, f"batch {i}") for i, raw in enumerate(calib_data)]
    if not batches:
        raise ValueError("the calibration set is empty: give at least one batch (128 rows are usual)")
    return [_fit_forward(batch, model, f"batch {i}") for i, batch in enumerate(batches)]


def is_ready(raw: Any) -> bool:
    """Whether `raw` already is model input: a mapping of tensors, or integer token ids."""
    if isinstance(raw, Mapping):
        return bool(MODEL_INPUT_NAMES & raw.keys())
    if isinstance(raw, list):
        return bool(raw) and all(isinstance(value, int) for value in raw)
    return isinstance(raw, CalibBatch) or (
        isinstance(raw, Tensor | np.ndarray)
        and raw.ndim <= 2
        and str(raw.dtype).rpartition(".")[2][:3] == "int"
    )


def ready_batch(raw: Any, image_ids: frozenset[int], where: str) -> CalibBatch:
    """One batch with its kinds.

    Args:
        raw: a mapping of model inputs, token ids (n_tokens,) or (rows, n_tokens), or a CalibBatch.
        image_ids: the ids of tokens that stand for visual features.
        where: names the batch in messages.
    """
    if isinstance(raw, CalibBatch):
        kinds = raw.kinds.clone()
        ids = raw.inputs.get("input_ids")
        if ids is not None and image_ids:
            kinds[_is_in(ids, image_ids) & (kinds == TEXT)] = IMAGE
        return CalibBatch(dict(raw.inputs), kinds)
    if not is_ready(raw):
        raise TypeError(_not_ready(where, raw))
    inputs = dict(raw) if isinstance(raw, Mapping) else {"input_ids": raw}
    inputs = {name: _as_tensor(value) for name, value in inputs.items()}
    n_tokens = inputs["input_ids"].shape[-1] if "input_ids" in inputs else None
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim == 1 and value.shape[0] == n_tokens:
            inputs[name] = value[None]
    labels = inputs.pop("labels", None)
    return CalibBatch(inputs, token_kinds(inputs, image_ids, labels, where=where))


def token_kinds(
    inputs: Mapping[str, Any],
    image_ids: frozenset[int],
    labels: Tensor | None = None,
    *,
    where: str = "batch",
) -> Tensor:
    """The kind of each token, see the module.

    Args:
        inputs: model inputs; without input_ids and inputs_embeds (a vision model, or pictures read by a
            decoder) there are no tokens to tell apart.
        image_ids: the ids of tokens that stand for visual features.
        labels: (rows, n_tokens) or None.
        where: names the batch in messages.

    Returns:
        (rows, n_tokens) int8.

    Raises:
        ValueError: there is no token, token ids are no integers, or the attention mask has another shape.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    tokens = embeds if ids is None else ids
    if tokens is None:
        picture = next(inputs[name] for name in PICTURE_NAMES if name in inputs)
        return torch.zeros(len(picture), 0, dtype=torch.int8)
    shape = tokens.shape if ids is not None else tokens.shape[:2]
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{where}: expected input_ids (rows, n_tokens), got shape {tuple(shape)}")
    if ids is not None and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f"{where}: expected integer input_ids, got {ids.dtype}")

    kinds = torch.full(shape, TEXT, dtype=torch.int8)
    if labels is not None and labels.shape == shape:
        kinds[labels.cpu() != IGNORED_LABEL] = ANSWER
    is_image = _is_in(ids, image_ids) if ids is not None else torch.zeros(shape, dtype=torch.bool)
    types = inputs.get("mm_token_type_ids")
    if not is_image.any() and types is not None:
        is_image = (types == 1) | (types == 2)
    kinds[is_image.cpu()] = IMAGE
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        if mask.shape != shape:
            raise ValueError(
                f"{where}: attention_mask {tuple(mask.shape)} does not fit tokens {tuple(shape)}"
            )
        kinds[mask.cpu() == 0] = PADDING
    if not (kinds != PADDING).any():
        raise ValueError(f"{where}: every token is padding")
    return kinds


def config_image_token_ids(config: Any) -> frozenset[int]:
    """The ids of image and video placeholders that a model's config names, in sub-configs too."""
    if config is None:
        return frozenset()
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    ids = {getattr(part, name, None) for part in parts for name in IMAGE_ID_NAMES}
    return frozenset(i for i in ids if isinstance(i, int) and i >= 0)


def processor_image_token_ids(processor: Any) -> frozenset[int]:
    """The ids of image and video placeholders in a processor's output; empty for dual encoders and
    tokenizers.

    The tokenizer is asked first: Gemma 3's processor calls the token that is *replaced* by placeholders its
    image token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = set()
    for name in ("image_token", "video_token"):
        token_id = getattr(tokenizer, f"{name}_id", None)
        token_id = getattr(processor, f"{name}_id", None) if token_id is None else token_id
        token = getattr(processor, name, None)
        if token_id is None and isinstance(token, str):
            token_id = tokenizer.convert_tokens_to_ids(token)
        ids.add(token_id)
    return frozenset(i for i in ids if isinstance(i, int))


def collate_text(rows: Sequence[CalibBatch], pad_token_id: int) -> CalibBatch:
    """Pad rows without images on the right and stack them.

    Args:
        rows: batches of one row whose inputs are all (1, n_tokens).
        pad_token_id: the id to fill with; it is masked out.
    """
    if len(rows) == 1:
        return rows[0]
    width = max(row.kinds.shape[1] for row in rows)

    def stack(values: list[Tensor], fill: int) -> Tensor:
        padded = [nn.functional.pad(value, (0, width - value.shape[1]), value=fill) for value in values]
        return torch.cat(padded)

    kinds = stack([row.kinds for row in rows], PADDING)
    inputs = {
        name: stack([row.inputs[name] for row in rows], pad_token_id if name == "input_ids" else 0)
        for name in rows[0].inputs
    }
    return CalibBatch({**inputs, "attention_mask": (kinds != PADDING).long()}, kinds)


def _fit_forward(batch: CalibBatch, model: nn.Module, where: str) -> CalibBatch:
    """Drop inputs that the forward does not take; images and videos that it does not take are an error."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for what, name in (("images", "pixel_values"), ("videos", "pixel_values_videos")):
        if "input_ids" in parameters and name in batch.inputs and name not in parameters:
            raise ValueError(
                f"{where} holds {what}, but {type(model).__name__} takes no {name}: calibrate it on text, "
                f"or quantize the whole vision-language model"
            )
    extra = [] if takes_any else [name for name in batch.inputs if name not in parameters]
    if extra:
        logger.info("%s: %s.forward takes no %s; left out", where, type(model).__name__, ", ".join(extra))
    inputs = {name: value for name, value in batch.inputs.items() if name not in extra}
    if not inputs:
        raise ValueError(f"{where}: none of {', '.join(batch.inputs)} is an input of {type(model).__name__}")
    return CalibBatch(inputs, batch.kinds)


def _is_in(ids: Tensor, values: frozenset[int]) -> Tensor:
    return torch.isin(ids.cpu(), torch.tensor(sorted(values), dtype=torch.long))


def _as_tensor(value: Any) -> Any:
    """Numbers in lists and arrays become tensors; what is no numbers stays."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.as_tensor(value)
    if isinstance(value, list) and value:
        first = value[0]
        while isinstance(first, list) and first:
            first = first[0]
        if isinstance(first, int | float):
            return torch.tensor(value)
    return value


def _not_ready(where: str, raw: Any) -> str:
    return (
        f"{where}: expected model inputs (a mapping with input_ids or pixel_values) or integer token ids, "
        f"got {type(raw).__name__}; make batches of images and texts with vlmq.calib.load(source, processor)"
    )
