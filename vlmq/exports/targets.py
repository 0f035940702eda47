"""The formats that a packed model is exported to: what each can say of a layer, and what it makes of a model.

What a target says of a layer is its own record (`IntegerGrid`, `Blocks`), and saying it raises ValueError with the
reason where it cannot. A target that has roundings of its own beside schemes names them.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.exports import compressed_tensors, experts, gemma, gguf_file, gptq, mmproj_file
from vlmq.exports.gguf_blocks import COMMON, SMALLEST, Blocks, to_blocks, with_offsets
from vlmq.exports.gguf_layout import text_part
from vlmq.exports.gguf_vocabulary import vocabulary
from vlmq.exports.grid import IntegerGrid, integer_grid, wide_grid
from vlmq.exports.mmproj_families import vision_part
from vlmq.exports.writing import (
    disk_names,
    full_precision,
    kept_linears,
    packed_layers,
    routers,
    write_folder,
)
from vlmq.families.merged import merged_layers
from vlmq.formats import QuantizedWeight
from vlmq.integrity import listing

BFLOAT16 = "scales are float16; a reader that computes in bfloat16 rounds them: load with dtype=float16"


@dataclass(frozen=True)
class Content:
    """What a target makes of a model.

    Attributes:
        write: into an empty folder, with the largest size of one safetensors file.
        n_bytes: what that takes.
        layers: {how a layer is stored: number of layers}.
        notes: what a reader must know.
    """

    write: Callable[[Path, int | str], None]
    n_bytes: int
    layers: dict[str, int]
    notes: list[str]


def check_apart(model: PreTrainedModel, processor: Any) -> None:
    """That each packed layer has tensors of its own in a folder of transformers.

    Raises:
        ValueError: the family stores some packed layers as one tensor, under a name that a reader of it knows.
    """
    packed = packed_layers(model)
    groups = merged_layers(model, [*packed, *kept_linears(model)], "weight")
    affected = [names for group in groups if (names := [name for name in group if name in packed])]
    if affected:
        alike = ", ".join(repr(re.sub(r"\.\d+(?=\.)", ".*", name)) for name in affected[0])
        raise ValueError(
            f"this family stores {listing(affected[0])} with others as one tensor ({len(affected)} groups like this), "
            f"and this target has no such layers; quantize with an override of None to {alike} to export the rest"
        )


def _no_package() -> None:
    """The target needs no package."""


def _none(model: PreTrainedModel) -> Collection[str]:
    """No layer."""
    return ()


class HasCodes(Protocol):
    """A packed layer."""

    def quantized_weight(self) -> QuantizedWeight:
        """Its codes and scales."""
        ...


def _no_experts(model: PreTrainedModel) -> None:
    """The target has no layout for packed experts.

    Raises:
        ValueError: the model holds some.
    """
    if apart := list(experts.unfused(model)):
        raise ValueError(
            f"{apart[0]!r} holds packed experts, for which it has no layout that a reader was seen to read"
        )


def _is_model_file(name: str) -> bool:
    """Of a model that is replaced, all but its card and the like."""
    return ".safetensors" in name or name.endswith((".json", ".gguf", ".bin"))


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        say: a layer in the format; raises ValueError with the reason if it cannot.
        fill: the model, {layer: what `say` returned} and the processor.
        layers: the packed layers that go into it, by their path.
        check: raises ValueError if the model or its processor cannot be written, before any work.
        check_experts: raises ValueError with the reason if packed experts of the model cannot be written.
        check_package: raises ValueError if a package is missing.
        roundings: {name for `convert`: a layer in the format, and the weights that this leaves}.
        is_replaced: whether a file of the folder goes with the model that is replaced.
        example: a scheme that it can say, for messages.
        spared: paths of packed layers that are written in full precision where the target cannot say them.
        text_only: the same target for the text part alone, if it can leave the rest out.
    """

    say: Callable[[QuantizedWeight], Any]
    fill: Callable[[PreTrainedModel, dict[str, Any], Any], Content]
    layers: Callable[[PreTrainedModel], Mapping[str, HasCodes]] = packed_layers
    check: Callable[[PreTrainedModel, Any], object] = check_apart
    check_experts: Callable[[PreTrainedModel], None] = _no_experts
    check_package: Callable[[], None] = _no_package
    roundings: Mapping[str, Callable[[QuantizedWeight], tuple[Any, Tensor]]] = field(default_factory=dict)
    is_replaced: Callable[[str], bool] = _is_model_file
    example: str = "int4-sym-g128"
    spared: Callable[[PreTrainedModel], Collection[str]] = _none
    text_only: "Target | None" = None


def to_compressed_tensors(model: PreTrainedModel, said: dict[str, IntegerGrid], processor: Any) -> Content:
    """See `vlmq.exports.compressed_tensors`."""
    kept, kept_experts = [*kept_linears(model), *routers(model)], experts.kept_experts(model)
    grids, notes = compressed_tensors.align(experts.split(model, said), kept)
    notes += experts.notes(model)
    disk = disk_names(model, [*grids, *kept, *kept_experts])
    tensors = {
        f"{n}.{leaf}": t for n, g in grids.items() for leaf, t in compressed_tensors.write_layer(g).items()
    }
    if any(grid.zeros is not None for grid in grids.values()):
        notes.append(
            "layers with zero points load in transformers with "
            "quantization_config=CompressedTensorsConfig(dequantize=True) only"
        )
    if model.dtype == torch.bfloat16:
        notes.append(BFLOAT16)
    block = compressed_tensors.config_block(grids, kept, kept_experts, disk)
    return _folder(model, tensors, block, grids, notes, processor)


def to_gptq(model: PreTrainedModel, said: dict[str, IntegerGrid], processor: Any) -> Content:
    """See `vlmq.exports.gptq`."""
    grids = gptq.align(said)
    for name, grid in grids.items():
        if grid.bits not in gptq.WIDTHS:
            raise ValueError(f"gptq has widths {gptq.WIDTHS}, layer {name!r} needs {grid.bits} bits")
    tensors = {f"{n}.{leaf}": t for n, g in grids.items() for leaf, t in gptq.write_layer(g).items()}
    notes = []
    if model.main_input_name != "input_ids":
        notes.append("transformers refuses GPTQ models that take more than text; other readers do not")
    block = gptq.config_block(grids, disk_names(model, kept_linears(model)))
    return _folder(model, tensors, block, grids, notes, processor)


def to_gemma(model: PreTrainedModel, said: dict[str, IntegerGrid], processor: Any) -> Content:
    """See `vlmq.exports.gemma`."""
    tensors = {f"{n}.{leaf}": t for n, g in said.items() for leaf, t in gemma.write_layer(g).items()}
    notes = ["transformers 5.23 loads this format and cannot save it again"]
    if model.dtype == torch.bfloat16:
        notes.append(BFLOAT16)
    return _folder(model, tensors, gemma.config_block(said, kept_linears(model)), said, notes, processor)


def to_gguf(
    types: tuple[str, ...],
    has_pictures: bool,
    model: PreTrainedModel,
    said: dict[str, Blocks],
    processor: Any,
) -> Content:
    """See `vlmq.exports.gguf_file` and `mmproj_file`; a packed embedding or head takes the first of `types` that can
    say it."""
    part = text_part(model)
    words = vocabulary(processor, gguf_file.n_rows(part))
    text = gguf_file.collect(part, said, types)
    notes = gguf_file.notes_on(model, said, words)
    layers, n_bytes = gguf_file.kinds(said), gguf_file.n_bytes(text)
    vision = vision_part(model) if has_pictures else None
    pictures: dict[str, Blocks | Tensor] = {}
    if vision is not None:
        pictures = mmproj_file.collect(vision, model, said, processor)
        notes += vision.notes
        layers |= mmproj_file.floats_of(vision, said)
        n_bytes += gguf_file.n_bytes(pictures)
    elif part.path != "model":
        notes.append("the file holds the text part; the vision tower and the projector are not in it")

    def write(folder: Path, max_shard_size: int | str) -> None:
        gguf_file.write_file(folder / gguf_file.FILE, part, text, words)
        if vision is not None:
            fields = mmproj_file.picture_fields(vision, processor)
            mmproj_file.write_file(folder / mmproj_file.FILE, vision, fields, pictures)

    return Content(write, n_bytes, layers, notes)


def check_gguf(has_pictures: bool, model: PreTrainedModel, processor: Any) -> None:
    """That llama.cpp knows the text part, the tokenizer, and the vision part unless that is left out.

    Raises:
        ValueError: it does not; the message says why.
    """
    vocabulary(processor, gguf_file.n_rows(text_part(model)))
    if has_pictures and (part := vision_part(model)) is not None:
        mmproj_file.picture_fields(part, processor)


def _packed_anywhere(model: PreTrainedModel) -> dict[str, HasCodes]:
    part = vision_part(model)
    return {**gguf_file.packed_in_text(model), **({} if part is None else mmproj_file.packed_in_vision(part))}


def _packed_in_vision(model: PreTrainedModel) -> Collection[str]:
    part = vision_part(model)
    return () if part is None else mmproj_file.packed_in_vision(part)


def _gguf(types: tuple[str, ...]) -> Target:
    common = Target(
        say=lambda weight: to_blocks(weight, types),
        fill=partial(to_gguf, types, True),
        layers=_packed_anywhere,
        spared=_packed_in_vision,
        check=partial(check_gguf, True),
        check_package=gguf_file.check_package,
        roundings={"Q4_1": with_offsets},
        is_replaced=lambda name: name in (gguf_file.FILE, mmproj_file.FILE),
    )
    text_only = replace(
        common,
        fill=partial(to_gguf, types, False),
        layers=gguf_file.packed_in_text,
        spared=_none,
        check=partial(check_gguf, False),
    )
    return replace(common, text_only=text_only)


def _folder(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    block: dict[str, Any],
    grids: Mapping[str, IntegerGrid],
    notes: list[str],
    processor: Any,
) -> Content:
    """A folder of transformers with other tensors for the packed layers and another config."""

    def write(folder: Path, max_shard_size: int | str) -> None:
        write_folder(model, folder, tensors, block, processor=processor, max_shard_size=max_shard_size)

    kept = full_precision(model).values()
    n_bytes = sum(t.numel() * t.element_size() for t in (*kept, *tensors.values()))
    return Content(write, n_bytes, dict(Counter(_name(grid) for grid in grids.values())), notes)


def _name(grid: IntegerGrid) -> str:
    size = "channel" if grid.group_size is None else f"group {grid.group_size}"
    return f"{grid.bits} bit, {size}{'' if grid.zeros is None else ', zero points'}"


TARGETS: dict[str, Target] = {
    "compressed-tensors": Target(integer_grid, to_compressed_tensors, check_experts=experts.check),
    "vllm": Target(wide_grid, to_compressed_tensors, check_experts=experts.check),
    "gptq": Target(gptq.gptq_grid, to_gptq),
    "gemma": Target(gemma.channel_grid, to_gemma, example="int4-sym-channel"),
    "gguf": _gguf(COMMON),
    "gguf-small": _gguf(SMALLEST),
}
