"""Tiny mixtures of experts for `vlmq.eval.export_readers`, with random weights and the small model's tokenizer."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

from vlmq.eval.easy_vqa_data import demo_model_path
from vlmq.opening import open_processor

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 544,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3-moe-128": lambda: hf.Qwen3MoeConfig(**TEXT, **MOE),
    "mixtral-128": lambda: hf.MixtralConfig(**TEXT, num_local_experts=4, sliding_window=None),
}


def build(name: str) -> tuple[PreTrainedModel, Any]:
    """A model of `CONFIGS` in float32, and its tokenizer."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    return model, open_processor(str(demo_model_path())).tokenizer
