"""Small models that see, for readers of the vision part: one picture between two texts, as transformers takes it.

Weights are random, norms and biases away from 1 and 0, so that a swapped tensor shows; the tokenizer is that of the
small model that ships with vlmq, with the family's own tokens. Pictures have the size that the tower takes, so neither
reader resizes them, and the tokens around a picture are those that llama.cpp writes. Inner widths are no multiples of
32, as in SigLIP (4304) and Qwen2.5-VL (3420).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmq.eval.easy_vqa_data import demo_model_path
from vlmq.opening import open_processor

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 544,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
BEFORE, AFTER = "look at this ", " and what color is it?"


@dataclass(frozen=True)
class Prompt:
    """A picture between two texts, and the same as a batch for transformers."""

    before: str
    picture: Image.Image
    after: str
    batch: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How a family sees a picture.

    Attributes:
        config: of the model, `image_token` being the id of the first of `tokens`.
        tokens: the family's own.
        images: its image processor.
        around: what llama.cpp writes for a picture, "{}" for the tokens of the picture.
        n_tokens: for each "{}".
        size: (width, height) of the picture.
        inputs: from normalized pixels, (1, 3, height, width), and ids what the model's forward takes.
    """

    config: Callable[[int], PreTrainedConfig]
    tokens: tuple[str, ...]
    images: Callable[[], Any]
    around: str
    n_tokens: int
    size: tuple[int, int]
    inputs: Callable[[Tensor, Tensor], dict[str, Any]]


class Seeing:
    """A tokenizer and an image processor, which is what an export asks for."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def _llava_clip(token: int) -> PreTrainedConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**TOWER),
        image_token_index=token,
        vision_feature_layer=-2,
    )


def _llava_siglip(token: int) -> PreTrainedConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        image_token_index=token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )


def _pixels(pixels: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"pixel_values": pixels}


def _idefics3(kind: type, token: int) -> PreTrainedConfig:
    text = {**TEXT, "model_type": "llama"}
    return kind(text_config=text, vision_config=TOWER, scale_factor=2, image_token_id=token)


def _twice(pixels: Tensor, ids: Tensor) -> dict[str, Any]:
    """A picture as its only square and as the whole."""
    return {"pixel_values": torch.stack([pixels, pixels], 1)}


def _qwen(kind: type, vision: dict[str, Any], token: int) -> PreTrainedConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    common = {"depth": 3, "num_heads": 4}
    return kind(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=common | vision,
        image_token_id=token,
        vision_start_token_id=token + 1,
        vision_end_token_id=token + 2,
        video_token_id=token + 3,
    )


def _patches(side: int, pixels: Tensor, ids: Tensor) -> dict[str, Any]:
    """Two equal frames in patches, the four of a square after one another."""
    n_rows, n_columns = pixels.shape[2] // side, pixels.shape[3] // side
    frames = torch.cat([pixels, pixels]).view(1, 2, 3, n_rows // 2, 2, side, n_columns // 2, 2, side)
    flat = frames.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(n_rows * n_columns, -1)
    kinds = (ids == ids.mode().values.item()).long()
    grid = torch.tensor([[1, n_rows, n_columns]])
    return {"pixel_values": flat, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def _internvl(token: int) -> PreTrainedConfig:
    return hf.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**TOWER, "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=token,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _mistral3(token: int) -> PreTrainedConfig:
    return hf.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**TOWER, "model_type": "pixtral", "image_size": 112, "head_dim": 16},
        spatial_merge_size=2,
        vision_feature_layer=-1,
        image_token_index=token,
    )


def _sized(pixels: Tensor, ids: Tensor) -> dict[str, Any]:
    return {"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[2:]])}


def _squares() -> Any:
    return Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 56})


FAKE = "<fake_token_around_image>"
SQUARES = ("<image>", FAKE, "<row_1_col_1>", "<global-img>", "\n\n")
AS_SQUARES = f"{FAKE}<row_1_col_1>{{}}\n\n{FAKE}<global-img>{{}}{FAKE}"
QWEN = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
QWEN_2 = {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14}
QWEN_2_5 = {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 80, "patch_size": 14}
QWEN_2_5 |= {"fullatt_block_indexes": [1], "window_size": 112}
QWEN_3 = {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 80, "patch_size": 16}
QWEN_3 |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
AS_QWEN = "<|vision_start|>{}<|vision_end|>"
FAMILIES: dict[str, Family] = {
    "llava-siglip": Family(_llava_siglip, ("<image>",), CLIPImageProcessorPil, "{}", 16, (56, 56), _pixels),
    "llava-clip": Family(_llava_clip, ("<image>",), CLIPImageProcessorPil, "{}", 16, (56, 56), _pixels),
    "smolvlm": Family(
        partial(_idefics3, hf.SmolVLMConfig), SQUARES, _squares, AS_SQUARES, 4, (56, 56), _twice
    ),
    "idefics3": Family(
        partial(_idefics3, hf.Idefics3Config), SQUARES, _squares, AS_SQUARES, 4, (56, 56), _twice
    ),
    "qwen2_vl": Family(
        partial(_qwen, hf.Qwen2VLConfig, QWEN_2),
        QWEN,
        Qwen2VLImageProcessorPil,
        AS_QWEN,
        12,
        (112, 84),
        partial(_patches, 14),
    ),
    "qwen2_5_vl": Family(
        partial(_qwen, hf.Qwen2_5_VLConfig, QWEN_2_5),
        QWEN,
        Qwen2VLImageProcessorPil,
        AS_QWEN,
        30,
        (168, 140),
        partial(_patches, 14),
    ),
    "qwen3_vl": Family(
        partial(_qwen, hf.Qwen3VLConfig, QWEN_3),
        QWEN,
        Qwen2VLImageProcessorPil,
        AS_QWEN,
        16,
        (128, 128),
        partial(_patches, 16),
    ),
    "internvl": Family(
        _internvl,
        ("<IMG_CONTEXT>", "<img>", "</img>"),
        GotOcr2ImageProcessorPil,
        "<img>{}</img>",
        4,
        (56, 56),
        _pixels,
    ),
    "mistral3": Family(
        _mistral3,
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        CLIPImageProcessorPil,
        "{}[IMG_BREAK]{}[IMG_BREAK]{}[IMG_END]",
        4,
        (112, 84),
        _sized,
    ),
}


def build(name: str) -> tuple[PreTrainedModel, Seeing]:
    """A model of that family in float32 with fixed random weights, and its processor."""
    family = FAMILIES[name]
    tokenizer = copy.deepcopy(open_processor(str(demo_model_path())).tokenizer)
    tokenizer.add_tokens([hf.AddedToken(t, special=t.strip() != "", normalized=False) for t in family.tokens])
    auto: Any = hf.AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(family.config(tokenizer.convert_tokens_to_ids(family.tokens[0])))
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data.normal_(0, 0.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), Seeing(tokenizer, family.images())


def prompt(name: str, processor: Seeing, seed: int) -> Prompt:
    """A random picture of the size that the tower takes, between two texts."""
    family, images = FAMILIES[name], processor.image_processor
    width, height = family.size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.image_mean, images.image_std))
    pixels = (torch.tensor(values).permute(2, 0, 1)[None] / 255 - mean) / deviation
    seen = family.around.replace("{}", family.tokens[0] * family.n_tokens)
    ids = processor.tokenizer(BEFORE + seen + AFTER, return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **family.inputs(pixels, ids)}
    return Prompt(BEFORE, Image.fromarray(values), AFTER, batch)
