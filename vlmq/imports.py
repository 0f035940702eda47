"""Load checkpoints of other formats into packed layers: compressed-tensors, GPTQ and AWQ, without their packages.

The model is built on the meta device; each linear layer that the files hold packed becomes a `ForeignLinear`, an empty
place for its tensors as they are stored. transformers fills these, under whatever names a family has on disk; then
each is read (`vlmq.foreign`) and replaced by a `QuantLinear` with the same values. What results is a model of vlmq's
own: its kernels run it, and `vlmq.save` writes it.

At the peak the packed tensors of the model and of one layer in vlmq's layout are in memory. Not read: quantized
activations, experts that transformers fuses, layers on disk offload.
"""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vlmq.attach import attach
from vlmq.families import describe
from vlmq.foreign import Reader, read_awq, read_compressed, read_gptq
from vlmq.integrity import check_missing
from vlmq.linear import QuantLinear
from vlmq.overrides import check_merged
from vlmq.scheme import Scheme

METHODS = ("compressed-tensors", "gptq", "awq")
IMPORT_METHOD = "vlmq-import"
SHAPES = Mapping[str, tuple[tuple[int, ...], str]]
INTEGERS = {"I32": torch.int32, "I64": torch.int64}


class ForeignLinear(nn.Module):
    """The tensors of one layer as another format stores them, and what the layer was."""

    def __init__(self, linear: nn.Linear, shapes: SHAPES) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        for leaf, (shape, kind) in shapes.items():
            dtype = self.dtype if leaf == "bias" else INTEGERS.get(kind, torch.float32)
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
        if linear.bias is not None and "bias" not in shapes:  # under another name, such as one for q, k and v
            self.bias = nn.Parameter(torch.empty_like(linear.bias, device="meta"), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """A place for what initialization would write."""
        weight = torch.empty(0, self.in_features, dtype=self.dtype)
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight


class ImportConfig(QuantizationConfigMixin):
    """The block of another format, under the name by which transformers finds `ImportQuantizer`."""

    def __init__(self, source: Mapping[str, Any], quant_method: str = IMPORT_METHOD, **_: Any) -> None:
        self.quant_method: Any = quant_method
        self.source = dict(source)


class ImportQuantizer(HfQuantizer):
    """Makes place for the tensors before a load, and packs them after it."""

    requires_calibration = True

    def __init__(self, quantization_config: ImportConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.source = quantization_config.source
        self.marker = marker_of(self.source)
        self.schemes: dict[str, str] = {}

    def is_serializable(self) -> bool:
        """Only what it makes can be saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Packed layers hold no trainable parameter."""
        return False

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """No parameter is quantized on the way."""
        return False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        layers = _layers_on_disk(checkpoint_files or [], self.marker)
        if not layers:
            raise ValueError(
                f"the checkpoint holds no tensor {self.marker!r}, though its config says that it is packed"
            )
        names = _names_in_memory(model, list(layers))
        for on_disk, name in names.items():
            linear = dict(model.named_modules()).get(name)
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"packed layer {on_disk!r} is no linear layer of {type(model).__name__}; not read"
                )
            model.set_submodule(name, ForeignLinear(linear, layers[on_disk]))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        foreign = {name: layer for name, layer in model.named_modules() if isinstance(layer, ForeignLinear)}
        check_missing(model, foreign)
        for name, layer in foreign.items():
            tensors = {leaf: p.detach() for leaf, p in layer.named_parameters(recurse=False)}
            if any(tensor.is_meta for tensor in tensors.values()):
                raise ValueError(f"layer {name!r} is offloaded to disk; load it to a device")
            bias = tensors.pop("bias", None)
            try:
                bits = _bits(self.source, self.marker, tensors[self.marker], layer.in_features)
                weight = reader_of(self.source)(tensors, layer.in_features, bits)
            except ValueError as error:
                raise ValueError(f"layer {name!r} cannot be read without loss: {error}") from error
            model.set_submodule(name, QuantLinear.from_quantized(weight, bias, dtype=layer.dtype))
            self.schemes[name] = Scheme(weight.format, weight.group_size).name


def load_foreign(
    model_class: Any, path_or_id: str | os.PathLike[str], config: PreTrainedConfig, options: Mapping[str, Any]
) -> PreTrainedModel:
    """Load a checkpoint whose config names one of `METHODS`.

    Args:
        model_class: class that was saved.
        path_or_id: folder or repository of the hub.
        config: of the model; changed.
        options: go to `from_pretrained`.

    Raises:
        ValueError: a layout that is not read, a layer that vlmq cannot say without loss, layers that could not be saved
            again, or missing tensors.
    """
    source = dict(config.quantization_config)
    marker_of(source)
    config.quantization_config = {"quant_method": IMPORT_METHOD, "source": source}
    model = model_class.from_pretrained(path_or_id, **{**options, "config": config, "use_safetensors": True})
    schemes = model.hf_quantizer.schemes
    model.hf_quantizer = None
    check_merged(
        model, describe(model), {}, "vlmq cannot save it; it needs a checkpoint with one scheme for them"
    )
    attach(model, schemes, {"imported_from": source["quant_method"]})
    return model


def marker_of(source: Mapping[str, Any]) -> str:
    """Check a block, and return the last name of the tensor that each packed layer has.

    Raises:
        ValueError: a kind of this format that is not read.
    """
    method = source.get("quant_method")
    if method != "compressed-tensors":
        reader_of(source)
        return "qweight"
    groups = source.get("config_groups") or {}
    for key, group in groups.items():
        form = group.get("format") or source.get("format")
        if form != "pack-quantized" or (group.get("weights") or {}).get("type") != "int":
            raise ValueError(
                f"compressed-tensors {key}: expected whole numbers in pack-quantized, got {form}"
            )
        if group.get("input_activations") or group.get("output_activations"):
            raise ValueError(f"compressed-tensors {key}: it quantizes activations, vlmq weights only")
    if source.get("transform_config") or source.get("kv_cache_scheme"):
        raise ValueError("compressed-tensors: transforms and quantized caches are not read")
    return "weight_packed"


def reader_of(source: Mapping[str, Any]) -> Reader:
    """The function that reads a layer.

    Raises:
        ValueError: a layout that is not read.
    """
    method = source.get("quant_method")
    if method == "compressed-tensors":
        return read_compressed
    if method == "awq":
        layout = source.get("version") or source.get("format") or "gemm"
        if layout != "gemm":
            raise ValueError(f"AWQ of layout {layout!r} is not read; known: gemm")
        return read_awq
    offsets = {"gptq": 1, "gptq_v2": 0}
    layout = source.get("checkpoint_format") or source.get("format") or "gptq"
    if layout not in offsets:
        raise ValueError(f"GPTQ of layout {layout!r} is not read; known: {' '.join(offsets)}")
    return partial(read_gptq, zero_offset=offsets[layout])


def _bits(source: Mapping[str, Any], marker: str, packed: Tensor, in_features: int) -> int:
    """Width of a layer's codes: the one that its config names and its shape allows."""
    if source["quant_method"] == "awq":
        return int(source.get("bits") or source.get("w_bit") or 4)
    if marker == "qweight":
        return 32 * packed.shape[0] // in_features
    named = {int(group["weights"]["num_bits"]) for group in source["config_groups"].values()}
    fits = [bits for bits in named if -(-in_features * bits // 32) == packed.shape[1]]
    if len(fits) != 1:
        raise ValueError(
            f"{packed.shape[1]} words for {in_features} inputs fit {len(fits)} of the widths {sorted(named)}"
        )
    return fits[0]


def _layers_on_disk(files: list[str], marker: str) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """{layer: {last name of a tensor: its shape and dtype}} of the packed layers."""
    found: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                layer, _, leaf = name.rpartition(".")
                piece = file.get_slice(name)
                found.setdefault(layer, {})[leaf] = (tuple(piece.get_shape()), piece.get_dtype())
    return {layer: leaves for layer, leaves in found.items() if marker in leaves}


def _names_in_memory(model: PreTrainedModel, layers: list[str]) -> dict[str, str]:
    """What the model calls the layers that the files call so, by the renames of its family."""
    mapping = get_model_conversion_mapping(model)
    converters: Any = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings: Any = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    own = model.state_dict()
    names: dict[str, str] = {}
    for layer in layers:
        key, conversion = rename_source_key(
            f"{layer}.weight", renamings, converters, model.base_model_prefix, own
        )
        if conversion is not None:
            raise ValueError(
                f"packed layer {layer!r} is not read: {type(model).__name__} splits, merges or reorders its weight "
                f"({key!r}); vlmq reads packed layers that correspond one to one"
            )
        names[layer] = key.removesuffix(".weight")
    return names


AUTO_QUANTIZATION_CONFIG_MAPPING[IMPORT_METHOD] = ImportConfig
AUTO_QUANTIZER_MAPPING[IMPORT_METHOD] = ImportQuantizer
