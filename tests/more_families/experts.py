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
    picture,
    pixels,
)

LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
EXPERTS: dict[str, Family] = {
    "mixtral": causal(hf.MixtralConfig, 24, num_local_experts=4),
    "gpt_oss": causal(hf.GptOssConfig, 24, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "olmoe": causal(hf.OlmoeConfig, 24, **MOE),
    "deepseek_v3": causal(
        hf.DeepseekV3Config,
        24,
        **ROUTED,
        **LATENT,
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
    "llama4": Family(
        lambda: hf.Llama4Config(
            text_config={
                **TEXT,
                "intermediate_size_mlp": 96,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
                "layer_types": ["chunked_attention", "full_attention"],
                "attention_chunk_size": 8,
            },
            vision_config={
                **VISION,
                "intermediate_size": 128,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
            },
            image_token_index=IMAGE_TOKEN,
        ),
        n_packed=34,
        image_tokens=1,
        extra=picture(),
    ),
    "step3p7": Family(
        lambda: hf.Step3p7Config(
            text_config={
                **TEXT,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "share_expert_dim": 32,
                "num_sliding_attention_heads": 4,
                "query_pre_attn_scalar": 16,
                "sliding_window": 8,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "full_attention"],
            },
            vision_config={**VISION, "image_size": 56},
            image_token_id=IMAGE_TOKEN,
        ),
        n_packed=36,
        image_tokens=1,
        extra=picture(56),
    ),
    "kimi_k25": Family(
        lambda: hf.Kimi_K25Config(
            text_config={
                **TEXT,
                **ROUTED,
                **LATENT,
                "model_type": "deepseek_v3",
            },
            vision_config={
                "patch_size": 14,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
            },
            projection_hidden_size=32,
            image_token_id=IMAGE_TOKEN,
            tie_word_embeddings=False,
        ),
        n_packed=36,
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows * 16, 3, 14, 14),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        },
    ),
}
