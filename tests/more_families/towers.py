"""A vision tower, a projector and a language model, of kinds that `tiny_models` does not have."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tiny_models import IMAGE_TOKEN, TEXT, VISION
from transformers import PreTrainedConfig

from more_families.family import (
    GLM_TOKENS,
    GLM_VISION,
    ROPE,
    Family,
    patches,
    picture,
    pixels,
)

SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}


def llava_like(config: Any, text: str, **more: Any) -> Callable[[], PreTrainedConfig]:
    """A config with a vision tower, a projector and a language model of the named type."""
    return lambda: config(text_config={**TEXT, "model_type": text}, **more)


TOWERS: dict[str, Family] = {
    "llava_next": Family(
        llava_like(
            hf.LlavaNextConfig,
            "mistral",
            vision_config=CLIP,
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=[[28, 28]],
            vision_feature_layer=-1,
        ),
        image_tokens=10,
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows, 2, 3, 28, 28),
            "image_sizes": torch.tensor([[28, 28]] * rows),
        },
        n_packed=26,
    ),
    "vipllava": Family(
        llava_like(
            hf.VipLlavaConfig,
            "llama",
            vision_config=CLIP,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layers=[-1, 0],
            image_seq_length=4,
        ),
        extra=picture(),
        n_packed=26,
    ),
    "aya_vision": Family(
        llava_like(
            hf.AyaVisionConfig,
            "cohere",
            vision_config=SIGLIP,
            image_token_index=IMAGE_TOKEN,
            downsample_factor=2,
            vision_feature_layer=-1,
        ),
        image_tokens=1,
        extra=picture(),
        n_packed=26,
    ),
    "got_ocr2": Family(
        llava_like(
            hf.GotOcr2Config,
            "qwen2",
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 128,
                "patch_size": 16,
                "mlp_dim": 48,
                "output_channels": 16,
                "window_size": 4,
                "global_attn_indexes": [1],
                "use_rel_pos": True,
            },
        ),
        extra=picture(128),
        n_packed=22,
    ),
    "glm4v": Family(
        lambda: hf.Glm4vConfig(
            text_config={**TEXT, "rope_parameters": ROPE}, vision_config=GLM_VISION, **GLM_TOKENS
        ),
        extra=patches,
        n_packed=22,
    ),
}
