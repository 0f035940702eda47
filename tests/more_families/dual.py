"""Dual encoders beside CLIP and SigLIP."""

from typing import Any

import torch
import transformers as hf
from tiny_models import DUAL_TEXT, VISION
from transformers import PreTrainedConfig

from more_families.family import (
    Family,
    picture,
    pixels,
)

DUAL_32 = {**DUAL_TEXT, "max_position_embeddings": 64, "projection_dim": 32}
VISION_32 = {**VISION, "projection_dim": 32}


def dual(
    config: Any,
    n_packed: int,
    text: dict[str, Any],
    vision: dict[str, Any],
    blocks: str = "v2t2",
    **more: Any,
) -> Family:
    """Two encoders of ids and pictures."""

    def made() -> PreTrainedConfig:
        return config(text_config=text, vision_config=vision, **more)

    return Family(made, n_packed, blocks, "AutoModel", image_tokens=0, extra=picture())


DUALS: dict[str, Family] = {
    "siglip2": Family(
        lambda: hf.Siglip2Config(
            text_config={**DUAL_TEXT, "max_position_embeddings": 16, "projection_size": 32},
            vision_config={**VISION, "num_patches": 4},
        ),
        auto="AutoModel",
        blocks="v2t2",
        image_tokens=0,
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows, 4, 3 * 14**2),
            "spatial_shapes": torch.tensor([[2, 2]] * rows),
            "pixel_attention_mask": torch.ones(rows, 4, dtype=torch.long),
        },
        n_packed=24,
    ),
    "altclip": dual(hf.AltCLIPConfig, 24, {**DUAL_32, "project_dim": 32}, VISION_32, projection_dim=32),
    "chinese_clip": dual(hf.ChineseCLIPConfig, 24, DUAL_32, VISION_32, projection_dim=32),
    "clipseg": dual(hf.CLIPSegConfig, 24, DUAL_32, VISION_32, projection_dim=32),
    "metaclip_2": dual(hf.MetaClip2Config, 24, DUAL_32, VISION_32, projection_dim=32),
    "blip": dual(hf.BlipConfig, 20, {**DUAL_32, "encoder_hidden_size": 32}, VISION_32, projection_dim=32),
}
