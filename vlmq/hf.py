"""The plug-in that makes `from_pretrained` and `save_pretrained` know packed models.

transformers looks a checkpoint's `quant_method` up in two tables of classes; importing this module (`import
vlmq` does) enters `VlmqConfig` and `VlmqQuantizer` there. There is no other way for a package to be found; what a load
without it meets is in `vlmq.guard`.

A model is loaded packed: while it is still on the meta device, each `nn.Linear` that the config names
becomes an empty `QuantLinear`, so no full-precision copy ever exists. What transformers only logs (missing
tensors, wrong integer dtypes, tensors it does not know) raises here, see `vlmq.integrity`.

Layers are named as the modules are called in memory, `model.named_modules()`; `save_pretrained` may store
tensors under other names (LLaVA's `model.language_model.layers` is `language_model.model.layers` on disk)
and undoes that on load. This is the only file that touches transformers' quantizer classes.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, dot_natural_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vlmq.decoding import prepare_decoding
from vlmq.embedding import TABLE, dequantize_embeddings, place_empty, submodule
from vlmq.families.experts import DOWN, UnfusedExperts, unfuse
from vlmq.guard import guards, patterns
from vlmq.integrity import (
    check_layer_tensor,
    check_listed,
    check_missing,
    check_sums,
    checksums,
    listing,
    packed_tensors,
    read_headers,
)
from vlmq.linear import QuantLinear, link_siblings
from vlmq.scheme import Scheme, parse_scheme
from vlmq.stored import conversion, forget_conversion, stored_tensors, unpack_layers

QUANT_METHOD = "vlmq"
FORMAT_VERSION = 3
KNOWN_VERSIONS = (1, 2, 3)
FIRST_WITH_TRITS = 3


class VlmqConfig(QuantizationConfigMixin):
    """The block `quantization_config` of config.json.

    `modules` maps a scheme's name to the names of the layers quantized with it, exactly as
    `model.named_modules()` gives them in memory (not as tensors are named on disk). `embeddings` maps the name of each
    packed token embedding to the packed layer whose rows it looks up (`vlmq.embedding`). `metadata` is what is
    worth knowing later: hash of the calibration set, seed, solver, saliency. What was measured per layer is
    in `vlmq_report.json`, see `vlmq.save`.
    """

    def __init__(
        self,
        modules: Mapping[str, list[str]],
        metadata: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        vlmq_version: str | None = None,
        checksums: Mapping[str, Any] | None = None,
        embeddings: Mapping[str, str] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        """Check the block.

        Raises:
            ValueError: an unknown format version, scheme or key, or a layer that is listed twice.
        """
        if format_version not in KNOWN_VERSIONS or isinstance(format_version, bool):
            known = ", ".join(map(str, KNOWN_VERSIONS))
            raise ValueError(
                f"checkpoint has vlmq format_version {format_version!r}, this vlmq ({version('vlmq')}) reads "
                f"{known}; upgrade vlmq (the checkpoint was written by vlmq {vlmq_version})"
            )
        if unknown:
            raise ValueError(f"quantization_config has keys that no format version has: {', '.join(unknown)}")
        listed = modules.values() if isinstance(modules, Mapping) else ()
        if not listed or not all(isinstance(names, list) for names in listed):
            raise ValueError("quantization_config.modules must map scheme names to lists of layer names")
        self.quant_method: Any = quant_method
        self.format_version = format_version
        self.vlmq_version = vlmq_version or version("vlmq")
        self.modules = {scheme: list(names) for scheme, names in modules.items()}
        self.metadata = dict(metadata or {})
        self.checksums = checksums
        self.embeddings = dict(embeddings or {})
        self.schemes()

    def schemes(self) -> dict[str, Scheme]:
        """Return {layer name: its scheme}."""
        schemes: dict[str, Scheme] = {}
        for text, names in self.modules.items():
            scheme = parse_scheme(text, where="quantization_config.modules")
            for name in names:
                if not isinstance(name, str) or name in schemes:
                    raise ValueError(
                        f"quantization_config.modules: layer {name!r} is listed twice or is no name"
                    )
                schemes[name] = scheme
        return schemes


class VlmqQuantizer(HfQuantizer):
    """What transformers asks while it loads or saves a packed model."""

    requires_calibration = True

    def __init__(self, quantization_config: VlmqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: VlmqConfig = quantization_config
        self._dtype: str | None = None

    def is_serializable(self) -> bool:
        """A packed model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed layers hold no trainable parameter."""
        return False

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Claim the tensors of packed layers, so that a wrong shape reaches our check, which names it."""
        return param_name.rpartition(".")[0] in self.quantization_config.schemes()

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        schemes = self.quantization_config.schemes()
        embeddings = self.quantization_config.embeddings
        tables = {f"{name}.{TABLE}" for name in embeddings}
        unfuse(model, schemes)
        linears = {name: submodule(model, name) for name in schemes if name not in tables}
        wrong = sorted(name for name, module in linears.items() if not isinstance(module, nn.Linear))
        if wrong:
            saved = ", ".join(model.config.architectures or ["unknown"])
            raise ValueError(
                f"{type(model).__name__} has no linear layer {listing(wrong)}, which config.json lists as "
                f"quantized; load with the class that was saved ({saved}), or with vlmq.load"
            )
        if checkpoint_files:
            read_headers(checkpoint_files, [s.format.has_zero for s in schemes.values()])
        for name, linear in linears.items():
            scheme = schemes[name]
            layer = QuantLinear(
                linear.in_features,
                linear.out_features,
                scheme.format,
                scheme.group_size,
                has_bias=linear.bias is not None,
                dtype=linear.weight.dtype,
                device=torch.device("meta"),
            )
            model.set_submodule(name, layer)
        place_empty(model, embeddings, schemes)
        known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = known | patterns(*_guarded(model, schemes))

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What to do to tensors as they are read, after a family's own conversions."""
        has_trits = self.quantization_config.format_version >= FIRST_WITH_TRITS
        return [conversion()] if has_trits else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        schemes = config.schemes()
        check_missing(model, schemes)
        forget_conversion(model)
        if config.format_version >= FIRST_WITH_TRITS:
            unpack_layers(model)
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in schemes}
        for layer in layers.values():
            # Families that keep some parts in float32 (T5) cast the scales too; the way back is exact.
            if layer.scales.dtype == torch.float32 and not layer.scales.is_meta:
                layer.scales = nn.Parameter(layer.scales.half(), requires_grad=False)
            for tensor in (layer.qweight, layer.scales, layer.zeros):
                if tensor is not None:
                    tensor.requires_grad_(False)
        for name, layer in layers.items():
            for leaf, tensor in packed_tensors(model, name):
                check_layer_tensor(f"{name}.{leaf}", leaf, tensor, layer)
        check_sums(model, config.modules, config.checksums, self._dtype)
        link_siblings(model)
        prepare_decoding(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Bring config and checksums up to date, store ternary codes in trits, add the guards, fix the order.

        transformers calls this before it writes the config. It sorts the tensors of a loaded model but not of
        a fresh one; sorted both times, the same model gives the same bytes.
        """
        config = self.quantization_config
        check_listed(model, config.schemes())
        config.checksums = checksums(model, config.modules)
        config.format_version = FORMAT_VERSION
        model.config.quantization_config = config
        tensors = model.state_dict() | stored_tensors(model) | guards(*_guarded(model, config.schemes()))
        return dict(sorted(tensors.items(), key=lambda item: dot_natural_key(item[0]))), {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype that the model is loaded in."""
        self._dtype = str(dtype)
        return dtype

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers gives the config's, which its own save turns into a word.
        wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dequantize_embeddings(model, self.quantization_config.embeddings, wanted)
        for name in self.quantization_config.schemes():
            layer: Any = submodule(model, name)
            if layer is None:  # the table of an embedding
                continue
            weight = layer.dequantize(wanted or model.dtype)
            linear = nn.Linear(*reversed(weight.shape), bias=layer.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight), layer.bias
            model.set_submodule(name, linear)
        experts = {name: m for name, m in model.named_modules() if isinstance(m, UnfusedExperts)}
        for name, module in experts.items():
            model.set_submodule(name, module.fused())
        return model


def _guarded(model: nn.Module, layers: Iterable[str]) -> tuple[list[str], list[str]]:
    """Layers that are modules of their own, and the fused parameters that the others stand for, as `guards` asks."""
    experts = {name: m for name, m in model.named_modules() if isinstance(m, UnfusedExperts)}
    inside = tuple(f"{name}." for name in experts)
    fused = [f"{name}.{projection}" for name, m in experts.items() for projection in (m.up, DOWN)]
    return [name for name in layers if not name.startswith(inside)], fused


def register() -> None:
    """Enter the two classes in transformers' tables; doing it again (a module reload) is harmless."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = VlmqConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = VlmqQuantizer


register()
