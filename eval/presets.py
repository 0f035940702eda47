"""Models of well-known shapes with random weights, so that speed can be measured without a download.

Only shapes are taken from the published configs; the weights are random and say nothing about quality. A packed
preset has random codes: its layers are built packed, so a model that does not fit in memory at full precision can
still be measured packed.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)

from vlmq.attach import attach
from vlmq.kernels.packing import pack
from vlmq.linear import QuantLinear
from vlmq.planning import plan


def _qwen2_5_vl_7b() -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
    )


def _llama(hidden: int, intermediate: int, n_layers: int, n_heads: int, vocab_size: int) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
    )


PRESETS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2.5-vl-7b": _qwen2_5_vl_7b,
    "llama-7b": lambda: _llama(4096, 11008, 32, 32, 32000),
    "llama-2048": lambda: _llama(2048, 5632, 16, 32, 32000),
    "llama-1536": lambda: _llama(1536, 4096, 15, 24, 32000),
    "llama-tiny": lambda: _llama(128, 256, 2, 4, 512),
}


def build_preset(
    name: str, scheme: str | None, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model of that shape with random weights.

    Args:
        name: a key of `PRESETS`.
        scheme: pack the linear layers that `vlmq.plan` would quantize, with random codes; None packs nothing.
        dtype: of everything that is not packed.
        device: where to build it.
        seed: of the weights.

    Raises:
        ValueError: an unknown preset or scheme.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; known: {' '.join(PRESETS)}")
    return build_random(PRESETS[name](), scheme, dtype=dtype, device=device, seed=seed)


def build_random(
    config: PreTrainedConfig,
    scheme: str | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """A model of a config with random weights; all else as `build_preset`.

    Raises:
        ValueError: an unknown scheme.
    """
    model = _build_empty(config, scheme, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    model.to_empty(device=device)
    for module in model.modules():
        _fill(module, generator)
        if next(module.buffers(recurse=False), None) is not None:
            model._init_weights(module)  # computes rotary frequencies and the like
    return model.eval()


def preset_bytes(name: str, scheme: str | None, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the weights that `build_preset` would make."""
    return sum(p.nbytes for p in _build_empty(PRESETS[name](), scheme, dtype).parameters())


def _build_empty(config: PreTrainedConfig, scheme: str | None, dtype: torch.dtype) -> PreTrainedModel:
    auto = AutoModelForCausalLM if isinstance(config, LlamaConfig) else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    if scheme is not None:
        _pack_empty(model, scheme, dtype)
    return model


def _pack_empty(model: PreTrainedModel, scheme: str, dtype: torch.dtype) -> None:
    """Replace the layers that the plan names by packed ones without values."""
    schemes = plan(model, scheme).schemes
    for path, chosen in schemes.items():
        dense = model.get_submodule(path)
        assert isinstance(dense, nn.Linear)
        layer = QuantLinear(
            dense.in_features,
            dense.out_features,
            chosen.format,
            chosen.group_size,
            has_bias=dense.bias is not None,
            dtype=dtype,
            device="meta",
        )
        model.set_submodule(path, layer)
    attach(model, {path: chosen.name for path, chosen in schemes.items()}, {"weights": "random"})


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Values for the module's own parameters: norms one, biases zero, the rest random and small."""
    if isinstance(module, QuantLinear):
        _fill_packed(module, generator)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2:
            parameter.data.fill_(0.0 if name == "bias" else 1.0)
        else:
            bound = parameter[0].numel() ** -0.5
            parameter.data.uniform_(-bound, bound, generator=generator)


def _fill_packed(layer: QuantLinear, generator: torch.Generator) -> None:
    codes = torch.randint(
        layer.format.n_levels,
        (layer.out_features, layer.in_features),
        generator=generator,
        device=layer.qweight.device,
        dtype=torch.uint8,
    )
    layer.qweight.data.copy_(pack(codes, layer.format.bits))
    layer.scales.data.fill_(2.0 / layer.format.n_levels * layer.in_features**-0.5)
    if layer.zeros is not None:
        layer.zeros.data.fill_(128)
    if layer.bias is not None:
        layer.bias.data.zero_()
