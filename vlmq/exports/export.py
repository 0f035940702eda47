"""Export a packed model to a format that other engines read.

Lossless where the target can say the same values, otherwise refused, with the reason and the layer. With `convert`, a
scheme such as "int4-sym-g128", layers that the target cannot say are first rounded to that scheme, to the nearest point
of the grid of least squared error, or as a rounding of the target's own says, and what this changed is measured:
||W' - W|| / ||W||, over all layers that were rounded.

What each target can say is in `vlmq.exports.targets` and in a module of its own. The folder is written whole or not at
all (`vlmq.staging`).
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vlmq.checkpoint import check_target
from vlmq.embedding import round_rows
from vlmq.exports.grid import ShapeError
from vlmq.exports.targets import TARGETS, Target
from vlmq.formats import QuantizedWeight
from vlmq.hf import VlmqQuantizer
from vlmq.scheme import Scheme, parse_scheme
from vlmq.staging import check_space, staged

Rounding = Callable[[QuantizedWeight], tuple[Any, Tensor]]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        layers: {how a layer is stored: number of layers}.
        n_converted: layers that were rounded anew.
        error: ||W' - W|| / ||W|| over those, None if none was.
        notes: what a reader must know.
    """

    folder: Path
    layers: dict[str, int]
    n_converted: int
    error: float | None
    notes: tuple[str, ...]


NEVER = {
    "bitnet": "transformers' bitnet layers round every input to 8 bits and know one scale per matrix, so no model "
    "gives the same output there; compressed-tensors and gemma say ternary layers exactly",
}


def check_export(to: str, *, text_only: bool = False) -> None:
    """Check the name of a target, and that it can leave the vision part out if that is asked for.

    Raises:
        ValueError: it is unknown, refused whatever the model is, or has no text part of its own.
    """
    if to in NEVER:
        raise ValueError(f"export to {to!r} is refused: {NEVER[to]}")
    if to not in TARGETS:
        raise ValueError(f"export to {to!r} is unknown; known: {' '.join(TARGETS)}")
    if text_only and TARGETS[to].text_only is None:
        able = ", ".join(name for name, target in TARGETS.items() if target.text_only is not None)
        raise ValueError(
            f"export to {to!r} holds the whole model; {able} can be written with the text part only"
        )
    TARGETS[to].check_package()


def export_model(
    model: PreTrainedModel,
    to: str,
    path: str | os.PathLike[str],
    processor: Any = None,
    *,
    convert: str | Scheme | None = None,
    text_only: bool = False,
    max_shard_size: int | str = "5GB",
) -> Export:
    """Write a packed model in the format of another engine.

    Args:
        model: quantized by vlmq.
        to: a key of `TARGETS`.
        path: the folder; new, empty, or a model that is replaced.
        processor: saved along; gguf takes the tokenizer from it.
        convert: scheme to round those layers to that the target cannot say, or one of the target's roundings; None
            refuses them.
        text_only: leave a vision tower and its projector out; gguf only.
        max_shard_size: largest size of one safetensors file.

    Raises:
        ValueError: an unknown target or a package that it needs, a model that is not packed, a folder that holds
            something else, or a layer, model or tokenizer that the target cannot say.
        OSError: no room, or another failure to write; the folder is then as it was before.
    """
    check_export(to, text_only=text_only)
    if not isinstance(getattr(model, "hf_quantizer", None), VlmqQuantizer):
        raise ValueError("the model holds no layer quantized by vlmq: call vlmq.quantize first")
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise TypeError(f"expected a processor with save_pretrained, got {type(processor).__name__}")
    folder = Path(path).resolve()
    check_target(folder)
    target = TARGETS[to].text_only if text_only else TARGETS[to]
    assert target is not None
    try:
        target.check_experts(model)
    except ValueError as error:
        raise ValueError(
            f"export to {to!r} is refused: {error}; quantize with an override of None to '*.experts.*' to export the "
            "rest"
        ) from error
    name = convert.name if isinstance(convert, Scheme) else convert
    rounding = None if name is None else _rounding(to, name)
    target.check(model, processor)
    said, error, n_converted = _say(model, target, to, name, rounding)
    content = target.fill(model, said, processor)
    if name is not None and not n_converted:
        content.notes.append(f"nothing was rounded to {name}: {to} can say every layer as it is")
    check_space(folder, content.n_bytes)
    with staged(folder, target.is_replaced) as new:
        content.write(new, max_shard_size)
    return Export(folder, content.layers, n_converted, error, tuple(content.notes))


def check_convert(to: str, convert: str, *, where: str = "convert") -> None:
    """Check what layers are to be rounded to.

    Raises:
        ValueError: neither a scheme nor a rounding that the target has.
    """
    if convert not in TARGETS[to].roundings:
        parse_scheme(convert, where=where)


def _rounding(to: str, convert: str) -> Rounding:
    """What rounds a layer; it raises ValueError where the target cannot say the result either."""
    check_convert(to, convert)
    target = TARGETS[to]
    if convert in target.roundings:
        return target.roundings[convert]
    scheme = parse_scheme(convert)

    def round_anew(weight: QuantizedWeight) -> tuple[Any, Tensor]:
        rounded = round_rows(weight.dequantize(), scheme)
        return target.say(rounded), rounded.dequantize()

    return round_anew


def _say(
    model: PreTrainedModel, target: Target, to: str, convert: str | None, rounding: Rounding | None
) -> tuple[dict[str, Any], float | None, int]:
    """All layers in the target's words, what rounding changed, and the number of layers rounded."""
    said: dict[str, Any] = {}
    spared = target.spared(model)
    n_converted = 0
    changed = total = 0.0
    for name, layer in target.layers(model).items():
        weight = layer.quantized_weight()
        try:
            said[name] = target.say(weight)
            continue
        except ShapeError as error:
            if name in spared:
                continue
            alike = re.sub(r"\.\d+(?=\.)", ".*", name)
            raise ValueError(
                f"{to} cannot say layer {name!r} of any scheme: {error}; quantize with an override of None to "
                f"{alike!r}, which keeps such layers in full precision, or export to a target that takes all sizes "
                "(compressed-tensors)"
            ) from error
        except ValueError as error:
            reason = error
        if rounding is None and name in spared:
            continue
        if rounding is None:
            ways = " or ".join(f"--convert {way}" for way in (target.example, *target.roundings))
            raise ValueError(
                f"{to} cannot say layer {name!r}, {Scheme(weight.format, weight.group_size).name}: {reason}; quantize "
                f"to a symmetric scheme such as {target.example}, or round such layers, with a measured loss: {ways} "
                "(in Python the argument convert)"
            ) from reason
        try:
            said[name], after = rounding(weight)
        except ValueError as again:
            if name in spared:
                continue
            raise ValueError(
                f"{to} cannot say {convert} of convert either (layer {name!r}: {again})"
            ) from again
        before = weight.dequantize()
        changed += float((after - before).square().sum())
        total += float(before.square().sum())
        n_converted += 1
    return said, (changed / total) ** 0.5 if total else None, n_converted
