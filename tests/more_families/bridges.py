"""Bridges of other kinds: resamplers, Q-Formers, cross-attention, encoder-decoders, patches without a tower."""

import torch
import transformers as hf
from tiny_models import IMAGE_TOKEN, TEXT, VISION

from more_families.family import (
    Family,
    picture,
    pixels,
)

NO_GROUPS = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
HEADS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}

BRIDGES: dict[str, Family] = {
    "idefics2": Family(
        lambda: hf.Idefics2Config(
            text_config={**TEXT, "model_type": "mistral"},
            vision_config=VISION,
            perceiver_config={
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            image_token_id=IMAGE_TOKEN,
        ),
        extra=lambda rows, ids: {"pixel_values": pixels(rows, 1, 3, 28, 28)},
        n_packed=26,
    ),
    "mllama": Family(
        lambda: hf.MllamaConfig(
            text_config={**TEXT, "cross_attention_layers": [1]},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
                "max_num_tiles": 1,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
            image_token_index=198,
        ),
        image_tokens=0,
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows, 1, 1, 3, 28, 28),
            "aspect_ratio_mask": torch.ones(rows, 1, 1, dtype=torch.long),
            "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(rows, ids.shape[1], 1, 1, dtype=torch.long),
        },
        n_packed=32,
        blocks="v3l2",
    ),
    "blip-2": Family(
        lambda: hf.Blip2Config(
            text_config={**TEXT, "model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64},
            vision_config=VISION,
            qformer_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "encoder_hidden_size": 32,
                "vocab_size": 200,
            },
            num_query_tokens=4,
            image_token_index=IMAGE_TOKEN,
        ),
        extra=picture(),
        n_packed=20,
    ),
    "kosmos-2": Family(
        lambda: hf.Kosmos2Config(
            text_config={
                "vocab_size": 200,
                "embed_dim": 64,
                "layers": 2,
                "ffn_dim": 96,
                "attention_heads": 4,
                "max_position_embeddings": 64,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            vision_config=VISION,
            latent_query_num=4,
        ),
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows, 3, 28, 28),
            "image_embeds_position_mask": (ids == IMAGE_TOKEN).long(),
        },
        n_packed=24,
    ),
    "git": Family(
        lambda: hf.GitConfig(
            vision_config=VISION,
            **NO_GROUPS,
        ),
        image_tokens=0,
        extra=picture(),
        n_packed=24,
    ),
    "pix2struct": Family(
        lambda: hf.Pix2StructConfig(
            text_config={
                "vocab_size": 200,
                "hidden_size": 64,
                "d_kv": 16,
                "d_ff": 96,
                "num_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            },
            vision_config={
                "hidden_size": 64,
                "patch_embed_hidden_size": 48,
                "d_ff": 96,
                "d_kv": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "seq_len": 16,
            },
        ),
        has_ids=False,
        extra=lambda rows, ids: {
            "flattened_patches": torch.cat([torch.ones(rows, 6, 2), pixels(rows, 6, 48)], dim=2),
            "decoder_input_ids": ids,
        },
        n_packed=36,
    ),
    "florence2": Family(
        lambda: hf.Florence2Config(
            text_config={
                "model_type": "bart",
                "vocab_size": 200,
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "max_position_embeddings": 64,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
            },
            vision_config={
                "depths": [1, 1],
                "patch_size": [7, 3],
                "patch_stride": [4, 2],
                "patch_padding": [3, 1],
                "patch_prenorm": [False, True],
                "embed_dim": [16, 32],
                "num_heads": [2, 4],
                "num_groups": [2, 4],
                "window_size": 4,
                "projection_dim": 64,
            },
            image_token_id=IMAGE_TOKEN,
        ),
        image_tokens=17,
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows, 3, 32, 32),
            "decoder_input_ids": ids[:, :4] % 190,
        },
        n_packed=48,
        blocks="v2l4",
    ),
    "fuyu": Family(
        lambda: hf.FuyuConfig(
            **NO_GROUPS,
            image_size=28,
            patch_size=14,
            num_channels=3,
            text_config={"model_type": "persimmon", **TEXT},
            image_token_id=IMAGE_TOKEN,
        ),
        extra=lambda rows, ids: {"image_patches": pixels(rows, 4, 3 * 14**2)},
        n_packed=8,
        blocks="l2",
    ),
    "janus": Family(
        lambda: hf.JanusConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "projection_dim": 64, "depth": 2, "mlp_ratio": 2, "num_image_tokens": 4},
            vq_config={
                "embed_dim": 8,
                "num_embeddings": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
                "latent_channels": 32,
                "num_patches": 14,
            },
            image_token_id=IMAGE_TOKEN,
        ),
        extra=picture(),
        n_packed=26,
    ),
    "molmo2": Family(
        lambda: hf.Molmo2Config(
            text_config={**TEXT, "additional_vocab_size": 8},
            vision_config={**HEADS, "num_hidden_layers": 2, "image_size": [28, 28], "patch_size": 14},
            adapter_config={**HEADS, "vision_feature_layer": [1, 0], "text_hidden_size": 64},
            image_patch_id=IMAGE_TOKEN,
        ),
        image_tokens=1,
        extra=lambda rows, ids: {
            "pixel_values": pixels(rows, 4, 3 * 14**2),
            "image_token_pooling": torch.arange(4 * rows).view(rows, 4),
            "image_grids": torch.tensor([[1, 1, 0, 0]] * rows),
        },
        n_packed=26,
    ),
}
