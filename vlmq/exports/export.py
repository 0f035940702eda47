"""Export a packed model to a format that other engines read.

Lossless where the target can say the same values, otherwise refused, with the reason and the layer. With `convert`, a
scheme such as "int4-sym-g128", layers that the target cannot say are first rounded to that scheme, to the nearest point
of the grid of least squared error, and what this changed is measured: ||W' - W|| / ||W||, over all layers that were
rounded.

What each target can say is in its own module. The folder is written whole or not at all (`vlmq.staging`).
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.checkpoint import check_target
from vlmq.embedding import round_rows
from vlmq.exports import compressed_tensors, gptq
from vlmq.exports.grid import IntegerGrid, integer_grid
from vlmq.exports.writing import disk_names, full_precision, kept_linears, packed_layers, write_folder
from vlmq.families.experts import UnfusedExperts
from vlmq.formats import QuantizedWeight
from vlmq.hf import VlmqQuantizer
from vlmq.scheme import Scheme, parse_scheme
from vlmq.staging import check_space, staged


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


@dataclass(frozen=True)
class Content:
    """What a target makes of a model: tensors of packed layers, the config block, how layers are stored, notes."""

    tensors: dict[str, Tensor]
    block: dict[str, Any]
    layers: dict[str, int]
    notes: list[str]


Weights = dict[str, QuantizedWeight]
Target = Callable[[PreTrainedModel, Weights], Content]


def to_compressed_tensors(model: PreTrainedModel, weights: Weights) -> Content:
    """See `vlmq.exports.compressed_tensors`."""
    kept = kept_linears(model)
    grids, notes = compressed_tensors.align({n: integer_grid(w) for n, w in weights.items()}, kept)
    disk = disk_names(model, [*grids, *kept])
    tensors = {
        f"{n}.{leaf}": t for n, g in grids.items() for leaf, t in compressed_tensors.write_layer(g).items()
    }
    if any(grid.zeros is not None for grid in grids.values()):
        notes.append(
            "layers with zero points load in transformers with "
            "quantization_config=CompressedTensorsConfig(dequantize=True) only"
        )
    if model.dtype == torch.bfloat16:
        notes.append(
            "scales are float16; a reader that computes in bfloat16 rounds them: load with dtype=float16"
        )
    block = compressed_tensors.config_block(grids, kept, disk)
    return Content(tensors, block, dict(Counter(_name(grid) for grid in grids.values())), notes)


def to_gptq(model: PreTrainedModel, weights: Weights) -> Content:
    """See `vlmq.exports.gptq`."""
    grids = gptq.align({n: gptq.gptq_grid(w) for n, w in weights.items()})
    for name, grid in grids.items():
        if grid.bits not in gptq.WIDTHS:
            raise ValueError(f"gptq has widths {gptq.WIDTHS}, layer {name!r} needs {grid.bits} bits")
    tensors = {f"{n}.{leaf}": t for n, g in grids.items() for leaf, t in gptq.write_layer(g).items()}
    notes = []
    if model.main_input_name != "input_ids":
        notes.append("transformers refuses GPTQ models that take more than text; other readers do not")
    block = gptq.config_block(grids, disk_names(model, kept_linears(model)))
    return Content(tensors, block, dict(Counter(_name(grid) for grid in grids.values())), notes)


TARGETS: dict[str, tuple[Target, Callable[[QuantizedWeight], Any]]] = {
    "compressed-tensors": (to_compressed_tensors, integer_grid),
    "gptq": (to_gptq, gptq.gptq_grid),
}


NEVER = {
    "bitnet": "transformers' bitnet layers round every input to 8 bits and know one scale per matrix, so no model "
    "gives the same output there; compressed-tensors says ternary layers exactly",
}


def check_export(to: str) -> None:
    """Check the name of a target.

    Raises:
        ValueError: it is unknown, or refused whatever the model is.
    """
    if to in NEVER:
        raise ValueError(f"export to {to!r} is refused: {NEVER[to]}")
    if to not in TARGETS:
        raise ValueError(f"export to {to!r} is unknown; known: {' '.join(TARGETS)}")


def export_model(
    model: PreTrainedModel,
    to: str,
    path: str | os.PathLike[str],
    processor: Any = None,
    *,
    convert: str | Scheme | None = None,
    max_shard_size: int | str = "5GB",
) -> Export:
    """Write a packed model in the format of another engine.

    Args:
        model: quantized by vlmq.
        to: a key of `TARGETS`.
        path: the folder; new, empty, or a model that is replaced.
        processor: saved along.
        convert: scheme to round those layers to that the target cannot say; None refuses them.
        max_shard_size: largest size of one safetensors file.

    Raises:
        ValueError: an unknown target, a model that is not packed, a folder that holds something else, or a layer
            that the target cannot say.
        OSError: no room, or another failure to write; the folder is then as it was before.
    """
    check_export(to)
    if not isinstance(getattr(model, "hf_quantizer", None), VlmqQuantizer):
        raise ValueError("the model holds no layer quantized by vlmq: call vlmq.quantize first")
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise TypeError(f"expected a processor with save_pretrained, got {type(processor).__name__}")
    target = Path(path).resolve()
    check_target(target)
    if apart := [name for name, module in model.named_modules() if isinstance(module, UnfusedExperts)]:
        raise ValueError(
            f"export to {to!r} is refused: {apart[0]!r} holds fused experts, which vlmq packs one by one and no reader "
            f"of {to} knows by these names; quantize with an override of None to '*.experts.*' to export the rest"
        )
    write, check = TARGETS[to]
    scheme = None if convert is None else parse_scheme(convert, where="convert")
    weights, error, n_converted = _weights(model, to, check, scheme)
    content = write(model, weights)
    if scheme is not None and not n_converted:
        content.notes.append(f"nothing was rounded to {scheme.name}: {to} can say every layer as it is")
    kept = full_precision(model).values()
    check_space(target, sum(t.numel() * t.element_size() for t in (*kept, *content.tensors.values())))
    with staged(target, _is_replaced) as folder:
        write_folder(
            model,
            folder,
            content.tensors,
            content.block,
            processor=processor,
            max_shard_size=max_shard_size,
        )
    return Export(target, content.layers, n_converted, error, tuple(content.notes))


def _weights(
    model: PreTrainedModel, to: str, check: Callable[[QuantizedWeight], Any], scheme: Scheme | None
) -> tuple[Weights, float | None, int]:
    """Weights that the target can say, what rounding changed, and the number of layers rounded."""
    weights: Weights = {}
    refused: dict[str, str] = {}
    changed = total = 0.0
    for name, layer in packed_layers(model).items():
        weight = layer.quantized_weight()
        reason = _why_not(weight, check)
        if reason is not None and scheme is not None:
            before = weight.dequantize()
            weight = round_rows(before, scheme)
            if (again := _why_not(weight, check)) is not None:
                raise ValueError(f"{to} cannot say {scheme.name} of convert either (layer {name!r}: {again})")
            changed += float((weight.dequantize() - before).square().sum())
            total += float(before.square().sum())
            refused[name] = reason
        elif reason is not None:
            raise ValueError(
                f"{to} cannot say layer {name!r}, {Scheme(weight.format, weight.group_size).name}: {reason}; quantize "
                "to a symmetric scheme such as int4-sym-g128, or convert to one (with a measured loss)"
            )
        weights[name] = weight
    error = (changed / total) ** 0.5 if total else None
    return weights, error, len(refused)


def _why_not(weight: QuantizedWeight, check: Callable[[QuantizedWeight], Any]) -> str | None:
    try:
        check(weight)
    except ValueError as error:
        return str(error)
    return None


def _name(grid: IntegerGrid) -> str:
    size = "channel" if grid.group_size is None else f"group {grid.group_size}"
    return f"{grid.bits} bit, {size}{'' if grid.zeros is None else ', zero points'}"


def _is_replaced(name: str) -> bool:
    """Of a model that is replaced, all but its card and the like."""
    return ".safetensors" in name or name.endswith((".json", ".gguf", ".bin"))
