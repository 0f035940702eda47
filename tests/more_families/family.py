"""What a tiny family is: its config, what a batch of it holds, and what must be found in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import IMAGE_TOKEN, TEXT
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        config: makes its config.
        n_packed: layers that are quantized by default.
        blocks: number of blocks by the first letter of their part: "v2l2" is two of vision, two of language.
        auto: the Auto class that builds it.
        image_tokens: ids in a row that stand for the image.
        extra: makes the inputs beside ids and mask, from the number of rows and the ids.
        has_ids: whether the model takes input_ids.
    """

    config: Callable[[], PreTrainedConfig]
    n_packed: int
    blocks: str = "v2l2"
    auto: str = "AutoModelForImageTextToText"
    image_tokens: int = 4
    extra: Callable[[int, torch.Tensor], dict[str, Any]] = field(default=lambda rows, ids: {})
    has_ids: bool = True


def pixels(rows: int, *shape: int) -> torch.Tensor:
    """The same random values for the same shape."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(7))


def picture(side: int = 28) -> Callable[[int, torch.Tensor], dict[str, Any]]:
    """One square image per row."""
    return lambda rows, ids: {"pixel_values": pixels(rows, 3, side, side)}


def patches(rows: int, ids: torch.Tensor) -> dict[str, Any]:
    """Inputs of the Qwen-VL and GLM-V kind: 4 x 4 patches per image, of 14 pixels."""
    return {
        "pixel_values": pixels(rows * 16, 3 * 2 * 14**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }


def causal(config: Any, n_packed: int, blocks: str = "l2", **more: Any) -> Family:
    """A plain language model."""
    return Family(
        lambda: config(**{**TEXT, **more}), n_packed, blocks, "AutoModelForCausalLM", image_tokens=0
    )


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
GLM_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 14,
    "image_size": 56,
}
GLM_TOKENS = {
    "image_token_id": 199,
    "video_token_id": 198,
    "image_start_token_id": 197,
    "image_end_token_id": 196,
    "video_start_token_id": 195,
    "video_end_token_id": 194,
}
