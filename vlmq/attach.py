"""Attach the record of what is packed to a model in memory, so that transformers saves and reloads it.

What transformers must be told: a config of the model's own with the block `quantization_config`, a quantizer, and
which weights are no longer tied. A model that was packed in part before is extended.
"""

import copy
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from vlmq.decoding import prepare_decoding
from vlmq.hf import QUANT_METHOD, VlmqConfig, VlmqQuantizer
from vlmq.integrity import check_listed, listing
from vlmq.linear import QuantLinear, link_siblings
from vlmq.scheme import parse_scheme


def earlier_quantizer(model: PreTrainedModel) -> VlmqQuantizer | None:
    """What an earlier run has packed, None for a model in full precision.

    Raises:
        ValueError: the model is quantized by another method.
    """
    earlier = getattr(model, "hf_quantizer", None)
    if earlier is not None and not isinstance(earlier, VlmqQuantizer):
        found = type(earlier).__name__
        raise ValueError(f"the model is already quantized by {found}; start from full precision")
    return earlier


def origin(model: PreTrainedModel) -> dict[str, Any]:
    """Where a model comes from, for its metadata: its repository (None if it is not in the hub's cache), versions."""
    name = getattr(model, "name_or_path", "")
    is_of_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()
    is_of_hub = is_of_hub and isinstance(try_to_load_from_cache(name, "config.json"), str)
    packages = ("vlmq", "torch", "transformers")
    return {
        "base_model": name if is_of_hub else None,
        "versions": {package: version(package) for package in packages},
    }


def attach(
    model: PreTrainedModel,
    modules: Mapping[str, str],
    metadata: Mapping[str, Any] | None = None,
    *,
    embeddings: Mapping[str, str] | None = None,
) -> None:
    """Tell transformers that the model is packed, so that it saves, pushes and reloads as any other.

    Called once the layers are `QuantLinear`; called again after further layers were quantized, it adds
    them and keeps the metadata of before as `earlier`. The model gets a config of its own: the one it was
    built from may build other models, which are not quantized.

    Args:
        model: holds exactly the packed layers that `modules` (and an earlier call) lists.
        modules: {layer name as in `model.named_modules()`: scheme name}.
        metadata: JSON values to keep in config.json: hash of the calibration set, seed, solver, saliency.
        embeddings: {name of a packed token embedding: name of the packed layer whose rows it looks up}.

    Raises:
        ValueError: the lists of layers differ, the model is quantized by another method, or a layer cannot be
            packed: it holds the model's first parameter, or a weight that stays tied.
        TypeError: metadata that JSON cannot hold.
    """
    earlier = earlier_quantizer(model)
    merged = {n: s.name for n, s in earlier.quantization_config.schemes().items()} if earlier else {}
    merged |= modules
    metadata = dict(metadata or {})
    if earlier is not None and earlier.quantization_config.metadata:
        metadata["earlier"] = earlier.quantization_config.metadata
    by_scheme: dict[str, list[str]] = {}
    for name, scheme in merged.items():
        by_scheme.setdefault(parse_scheme(scheme, where=f"layer {name!r}").name, []).append(name)
    looked_up = (dict(earlier.quantization_config.embeddings) if earlier else {}) | dict(embeddings or {})
    config = VlmqConfig(by_scheme, json.loads(json.dumps(metadata)), embeddings=looked_up)
    check_listed(model, config.schemes())
    _check_first_parameter(model)
    _own_config(model)
    _untie(model, set(merged))
    _cast_as_a_load_does(model)
    known: Any = model
    known.config.quantization_config = config
    known.config._is_quantized = True
    known.hf_quantizer = VlmqQuantizer(config, pre_quantized=True)
    known.is_quantized = True
    known.quantization_method = QUANT_METHOD
    link_siblings(model)
    prepare_decoding(model)


def _check_first_parameter(model: PreTrainedModel) -> None:
    """Refuse a packed layer in first place: transformers takes the first parameter's dtype as the model's."""
    owners = {id(m.scales): name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    floats = [p for p in model.parameters() if p.is_floating_point()]
    others = {p.dtype for p in floats if id(p) not in owners}
    if id(floats[0]) in owners and others - {torch.float16}:
        raise ValueError(
            f"layer {owners[id(floats[0])]!r} holds the model's first parameter, whose dtype transformers "
            "takes for the model's (it would find the scales' float16): keep this layer in full precision"
        )


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a copy of its config, shared by its submodules in the same way as the original was."""
    memo: dict[int, Any] = {}
    copy.deepcopy(model.config, memo)
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in memo:
                setattr(module, attribute, memo[id(value)])


def _cast_as_a_load_does(model: PreTrainedModel) -> None:
    """Make float32 what the family keeps in it (corrections of routers, for one), if the model was cast as a whole.

    transformers does so on every load; without it the model in memory would route other tokens than the loaded one.
    """
    patterns = list(model._get_dtype_plan(model.dtype))
    expression = build_glob_alternation(patterns)[0] if patterns else None
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if expression is None or tensor is None or isinstance(module, QuantLinear):
                continue
            if tensor.is_floating_point() and expression.search(f"{name}.{key}".lstrip(".")):
                tensor.data = tensor.data.float()


def _untie(model: PreTrainedModel, packed: set[str]) -> None:
    """Take packed layers out of the tying of weights; the full-precision partner is then stored by itself."""
    tied = dict(model.all_tied_weights_keys)
    parted = {target for target in tied if target.rpartition(".")[0] in packed}
    if not parted:
        return
    if len(parted) < len(tied):
        kept = listing(sorted(tied.keys() - parted))
        raise ValueError(
            f"layers {listing(sorted(parted))} cannot be packed while {kept} stay tied to the same weight: "
            "transformers has one switch for all of them; keep these layers in full precision"
        )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
