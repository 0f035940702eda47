"""Layers beside attention: linear attention, state spaces, convolutions."""

import torch
import transformers as hf
from tiny_models import IMAGE_TOKEN, QWEN3_VISION, QWEN_ROPE, QWEN_TOKENS, TEXT, VISION

from more_families.family import (
    MOE,
    Family,
    causal,
    patches,
    pixels,
)

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}

NEMOTRON = {
    "layers_block_type": ["mamba", "moe", "attention"],
    "num_hidden_layers": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
}
HYBRIDS: dict[str, Family] = {
    "qwen3_next": causal(hf.Qwen3NextConfig, 29, **MOE, **DELTA, shared_expert_intermediate_size=32),
    "qwen3_5_moe": Family(
        lambda: hf.Qwen3_5MoeConfig(
            text_config={
                **TEXT,
                **MOE,
                **DELTA,
                "shared_expert_intermediate_size": 32,
                "rope_parameters": {**QWEN_ROPE, "partial_rotary_factor": 1.0},
            },
            vision_config={**QWEN3_VISION, "patch_size": 14},
            **QWEN_TOKENS,
        ),
        extra=patches,
        n_packed=39,
    ),
    "granitemoehybrid": causal(
        hf.GraniteMoeHybridConfig,
        26,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
    ),
    "falcon_h1": causal(
        hf.FalconH1Config, 18, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16
    ),
    "nemotron_h": causal(
        hf.NemotronHConfig,
        16,
        "l3",
        **NEMOTRON,
    ),
    "lfm2": causal(hf.Lfm2Config, 12, layer_types=["conv", "full_attention"], block_multiple_of=16),
    "lfm2_moe": causal(
        hf.Lfm2MoeConfig, 17, **MOE, layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
    "lfm2_vl": Family(
        lambda: hf.Lfm2VlConfig(
            text_config={
                **TEXT,
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention"],
                "block_multiple_of": 16,
            },
            vision_config={
                **VISION,
                "model_type": "siglip2_vision_model",
                "num_patches": 16,
                "vision_use_head": False,
            },
            image_token_id=IMAGE_TOKEN,
            projector_hidden_size=64,
        ),
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows, 16, 3 * 14**2),
            "spatial_shapes": torch.tensor([[4, 4]] * rows),
            "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long),
        },
        n_packed=24,
    ),
    "jamba": causal(
        hf.JambaConfig,
        18,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_dt_rank=16,
        use_mamba_kernels=False,
    ),
    "nemotron_h_omni": Family(
        lambda: hf.CONFIG_MAPPING["nemotron_h_omni"](
            text_config={**TEXT, **NEMOTRON, "model_type": "nemotron_h"},
            vision_config={
                "model_type": "radio",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "mlp_ratio": 1.5,
                "patch_size": 14,
                "patch_dim": 3 * 14**2,
                "video_patch_dim": 6 * 14**2,
                "image_size": 56,
                "max_img_size": 56,
                "video_temporal_patch_size": 2,
            },
            vision_hidden_size=32,
            projector_hidden_size=64,
            image_token_id=IMAGE_TOKEN,
        ),
        n_packed=28,
        blocks="v2l3",
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows * 16, 3 * 14**2),
            "image_grid_hw": torch.tensor([[4, 4]] * rows),
        },
    ),
}
