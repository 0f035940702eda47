"""Mixtures of experts in fused parameters."""

import torch
import transformers as hf
from tiny_models import IMAGE_TOKEN, TEXT, VISION

from more_families.family import (
    GLM_TOKENS,
    GLM_VISION,
    MOE,
    ROPE,
    ROUTED,
    Family,
    causal,
    patches,
    pixels,
)

EXPERTS: dict[str, Family] = {
    "mixtral": causal(hf.MixtralConfig, 24, num_local_experts=4),
    "gpt_oss": causal(hf.GptOssConfig, 24, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "olmoe": causal(hf.OlmoeConfig, 24, **MOE),
    "deepseek_v3": causal(
        hf.DeepseekV3Config,
        24,
        **ROUTED,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_key_value_heads=4,
    ),
    "aria": Family(
        lambda: hf.AriaConfig(
            text_config={**TEXT, "moe_num_experts": 4, "moe_topk": 2, "model_type": "aria_text"},
            vision_config={**VISION, "patch_size": 14, "model_type": "idefics3_vision"},
            projector_patch_to_query_dict={4: 4},
            image_token_index=IMAGE_TOKEN,
        ),
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows, 3, 28, 28),
            "pixel_mask": torch.ones(rows, 28, 28, dtype=torch.bool),
        },
        n_packed=42,
    ),
    "glm4v_moe": Family(
        lambda: hf.Glm4vMoeConfig(
            text_config={
                **TEXT,
                **ROUTED,
                "rope_parameters": ROPE,
            },
            vision_config=GLM_VISION,
            **GLM_TOKENS,
        ),
        extra=patches,
        n_packed=32,
    ),
}
