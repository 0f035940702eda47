"""Write a packed model as a transformers folder of another format: other tensors for packed layers, another config.

Names on disk are those of the families' own checkpoints: what transformers gives, and the "vision_model" in the path of
a tower, which it drops on loading and, unless the checkpoint had it, leaves out on saving, while other engines ask for
it. Everything that is not packed goes through as it is. The model is not changed. Packed embeddings and a packed output
head are written in full precision, in the model's dtype, which is what a lookup gives: engines expect them so.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from vlmq.embedding import QuantEmbedding
from vlmq.integrity import PACKED
from vlmq.linear import QuantLinear


def packed_layers(model: PreTrainedModel) -> dict[str, QuantLinear]:
    """The packed layers by their path, without the output head and those that hold the rows of an embedding."""
    rows = {id(m.rows) for m in model.modules() if isinstance(m, QuantEmbedding)}
    rows.add(id(model.get_output_embeddings()))
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and id(m) not in rows}


def kept_linears(model: PreTrainedModel) -> list[str]:
    """Linear layers that the folder holds in full precision: those of the model, and a packed output head."""
    packed = packed_layers(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantLinear) and name not in packed and not name.endswith(".table")
    ]


def routers(model: PreTrainedModel) -> list[str]:
    """Modules whose weight is a matrix and that are no linear layers here, such as those that choose experts."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | QuantLinear | nn.Embedding | QuantEmbedding)
        and not name.endswith(".table")
        and isinstance(weight := module._parameters.get("weight"), nn.Parameter)
        and weight.ndim == 2
    ]


def full_precision(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors but those of packed layers, by their names in memory; embeddings that were packed are unpacked."""
    tensors: dict[str, Tensor] = {}
    packed = packed_layers(model)
    unpacked: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, QuantEmbedding)
            or isinstance(module, QuantLinear)
            and name not in packed
            and not name.endswith(".table")
        ):
            unpacked[name] = module.weight
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        is_row = owner in unpacked or owner.removesuffix(".table") in unpacked
        if (owner in packed and leaf in PACKED) or (is_row and leaf != "bias"):
            continue
        tensors[name] = tensor
    return tensors | {f"{name}.weight": weight for name, weight in unpacked.items()}


def disk_names(model: PreTrainedModel, layers: list[str]) -> dict[str, str]:
    """What `save_pretrained` calls each layer; the same name where a family keeps it."""
    known: Any = revert_weight_conversion
    twin = as_published(model)
    names: dict[str, str] = {}
    for layer in layers:
        (written,) = known(twin, {f"{layer}.weight_packed": torch.empty(0)})
        names[layer] = written.removesuffix(".weight_packed")
    return names


def as_published(model: PreTrainedModel) -> Any:
    """The same modules and tensors, to be saved by the names of the family's published checkpoints."""
    twin: Any = copy.copy(model)  # what is set here is its own
    every = get_model_conversion_mapping(model, add_legacy=False)
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        used = [known for known in every if not isinstance(known, PrefixChange)]
    there = {(tuple(known.source_patterns), known.scope_prefix) for known in used}
    towers = [
        known
        for known in every
        if isinstance(known, PrefixChange)
        and known.prefix_to_remove is not None
        and known.scope_prefix
        and (tuple(known.source_patterns), known.scope_prefix) not in there
    ]
    twin._weight_conversions = [*used, *towers]
    return twin


def write_folder(
    model: PreTrainedModel,
    folder: Path,
    tensors: Mapping[str, Tensor],
    block: Mapping[str, Any],
    *,
    processor: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write weights, config, generation config and processor.

    Args:
        model: the packed model.
        folder: an empty folder.
        tensors: what takes the place of the packed layers' tensors, by names as in memory.
        block: the new `quantization_config`.
        processor: anything with `save_pretrained`.
        max_shard_size: largest size of one safetensors file.
    """
    twin = as_published(model)
    twin.config = copy.deepcopy(model.config)
    twin.config.quantization_config = json.loads(json.dumps(block))
    twin.hf_quantizer = None
    twin.is_quantized = False
    state = full_precision(model) | dict(tensors)
    twin.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    if processor is not None:
        processor.save_pretrained(folder)
