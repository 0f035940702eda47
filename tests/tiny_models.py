"""Tiny random models of every family that vlmq supports, and inputs for their forward.

`FAMILIES` maps a family to the function that builds its config; `build` makes the model (seeded, no
download), and `inputs` makes batches that hold an image (plain language models: text only).
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

IMAGE_TOKEN = 199
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOKENS = {
    "image_token_id": 199,
    "video_token_id": 198,
    "vision_start_token_id": 197,
    "vision_end_token_id": 196,
}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 16,
    "num_position_embeddings": 64,
}


def _llama() -> PreTrainedConfig:
    return hf.LlamaConfig(**TEXT)


def _llava() -> PreTrainedConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_seq_length=4,
    )


def _qwen2_vl() -> PreTrainedConfig:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
        "in_channels": 3,
    }
    return hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": QWEN_ROPE}, vision_config=vision, **QWEN_TOKENS
    )


def _qwen2_5_vl() -> PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 14,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    return hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": QWEN_ROPE}, vision_config=vision, **QWEN_TOKENS
    )


def _qwen3_vl() -> PreTrainedConfig:
    return hf.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": QWEN_ROPE},
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    )


def _qwen3_vl_moe() -> PreTrainedConfig:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return hf.Qwen3VLMoeConfig(
        text_config={**TEXT, **experts, "rope_parameters": QWEN_ROPE},
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    )


def _qwen3_5() -> PreTrainedConfig:
    linear_attention = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    }
    rope = {**QWEN_ROPE, "partial_rotary_factor": 1.0}
    return hf.Qwen3_5Config(
        text_config={**TEXT, **linear_attention, "rope_parameters": rope},
        vision_config=QWEN3_VISION,
        **QWEN_TOKENS,
    )


def _gemma3() -> PreTrainedConfig:
    layers = {
        "sliding_window": 32,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return hf.Gemma3Config(
        text_config={**TEXT, **layers},
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=198,
        eoi_token_index=197,
    )


def _paligemma() -> PreTrainedConfig:
    return hf.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"},
        vision_config={
            **VISION,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "projection_dim": 64,
        },
        projection_dim=64,
        hidden_size=64,
        image_token_index=IMAGE_TOKEN,
    )


def _internvl() -> PreTrainedConfig:
    return hf.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _idefics3_like(config_class: type) -> PreTrainedConfig:
    return config_class(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "patch_size": 7},
        scale_factor=2,
        image_token_id=IMAGE_TOKEN,
    )


def _smolvlm() -> PreTrainedConfig:
    return _idefics3_like(hf.SmolVLMConfig)


def _idefics3() -> PreTrainedConfig:
    return _idefics3_like(hf.Idefics3Config)


def _mistral3() -> PreTrainedConfig:
    return hf.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral", "image_size": 56, "head_dim": 8},
        spatial_merge_size=2,
        vision_feature_layer=-1,
        image_token_index=IMAGE_TOKEN,
    )


DUAL_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 200,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _clip() -> PreTrainedConfig:
    return hf.CLIPConfig(
        text_config={**DUAL_TEXT, "max_position_embeddings": 64, "projection_dim": 32},
        vision_config={**VISION, "projection_dim": 32},
        projection_dim=32,
    )


def _siglip() -> PreTrainedConfig:
    return hf.SiglipConfig(
        text_config={**DUAL_TEXT, "max_position_embeddings": 16, "projection_size": 32}, vision_config=VISION
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "mistral3": _mistral3,
    "clip": _clip,
    "siglip": _siglip,
    "llama": _llama,
}
QWEN_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
DUAL_ENCODERS = ("clip", "siglip")
PLAIN_LANGUAGE = ("llama",)


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `family` in eval mode with fixed random weights; the global random state is left alone."""
    if family in DUAL_ENCODERS:
        auto: Any = hf.AutoModel
    elif family in PLAIN_LANGUAGE:
        auto = hf.AutoModelForCausalLM
    else:
        auto = hf.AutoModelForImageTextToText
    return from_config(auto, FAMILIES[family](), dtype)


def from_config(auto: Any, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of a config of one's own, with the same fixed random weights; `auto` is an AutoModel class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = auto.from_config(config, dtype=dtype)
        _randomize(model)
    return model.eval()


def _randomize(model: PreTrainedModel) -> None:
    """Weights of ordinary size, and norms and biases away from 1 and 0, so that a swapped tensor shows."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def inputs(
    family: str, n_batches: int = 2, *, rows: int = 1, dtype: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    """Batches for the model's forward; `rows` samples of 12 tokens each with one image per row."""
    generator = torch.Generator().manual_seed(4321)
    return [_batch(family, rows, dtype, generator) for _ in range(n_batches)]


def _batch(family: str, rows: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    n_tokens, start = 12, 3
    ids = torch.randint(3, 190, (rows, n_tokens), generator=generator)
    attention_mask = torch.ones(rows, n_tokens, dtype=torch.long)
    if family in PLAIN_LANGUAGE:
        return {"input_ids": ids, "attention_mask": attention_mask}
    pixels = torch.randn(rows, 3, 28, 28, generator=generator).to(dtype)
    if family in DUAL_ENCODERS:
        ids[:, -1] = 2
        batch = {"input_ids": ids, "pixel_values": pixels}
        return batch | ({"attention_mask": attention_mask} if family == "clip" else {})
    ids[:, start : start + 4] = IMAGE_TOKEN
    batch = {"input_ids": ids, "attention_mask": attention_mask, "pixel_values": pixels}
    if family in QWEN_FAMILIES:
        ids[:, start - 1] = QWEN_TOKENS["vision_start_token_id"]
        patch = 14 if family in ("qwen2_vl", "qwen2_5_vl") else 16
        batch["pixel_values"] = torch.randn(rows * 16, 3 * 2 * patch**2, generator=generator).to(dtype)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    elif family in ("gemma3", "paligemma"):
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    elif family in ("smolvlm", "idefics3"):
        batch["pixel_values"] = pixels[:, None]
    elif family == "mistral3":
        batch["pixel_values"] = torch.randn(rows, 3, 56, 56, generator=generator).to(dtype)
        batch["image_sizes"] = torch.tensor([[56, 56]] * rows)
    return batch
