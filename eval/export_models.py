"""Packed models for `vlmq.eval.export_readers`: the small model that ships with vlmq, random ones, or a folder.

The layers of the first two are rounded to the scheme (`solver="rtn"`), so nothing depends on calibration data; towers
are kept, but for `SEEING` and the random models of `vlmq.eval.picture_models`. The random Llama is as wide as GGUF's
blocks of 256 weights ask for, and has the small model's tokenizer.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, PreTrainedModel

import vlmq
from vlmq.eval import export_families, picture_models
from vlmq.eval.easy_vqa_data import demo_model_path, load_shapes
from vlmq.eval.picture_models import Prompt
from vlmq.opening import open_processor

SHAPES, LLAMA, SEEING = "shapes", "llama-256", "shapes, tower packed"
MADE = (SHAPES, LLAMA, SEEING, *picture_models.FAMILIES, *export_families.CONFIGS)
N_PROMPTS, N_PICTURES, N_SEEN = 4, 8, 2
PROSE = (
    "The river rises in the hills north of the town and reaches the sea after",
    "Water boils at a lower temperature on a mountain because the pressure of the air",
    "She opened the letter, read it twice, and put it back into",
    "A triangle with three equal sides has three equal",
)


@dataclass(frozen=True)
class Packed:
    """A packed model in float32, its processor, prompts of token ids, each (1, n_tokens), and some with pictures."""

    model: PreTrainedModel
    processor: Any
    prompts: list[Tensor]
    pictures: list[Prompt] = field(default_factory=list)


def open_packed(name: str, scheme: str) -> Packed:
    """Make a packed model of `MADE`, or load the packed folder of that name."""
    if name == SEEING or name in picture_models.FAMILIES:
        return _seeing(name, scheme)
    if name not in MADE:
        processor = open_processor(name)
        model = vlmq.load(name, dtype=torch.float32)
        return Packed(model, processor, _ids(processor, PROSE))
    processor = open_processor(str(demo_model_path()))
    rows = load_shapes("test", n_rows=N_PROMPTS)
    prompts = _ids(processor, [row["question"] for row in rows])
    pictures: list[Prompt] = []
    if name == SHAPES:
        auto: Any = AutoModelForImageTextToText
        model = auto.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
        pictures = [_question(processor, row) for row in rows[:N_SEEN]]
    elif name in export_families.CONFIGS:
        model, processor = export_families.build(name)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(llama()).eval()
    batches = [{"input_ids": ids} for ids in prompts]
    has_tower = getattr(model.config, "vision_config", None) is not None
    overrides = {"vision": None} if has_tower else None
    vlmq.quantize(model, batches, scheme, solver="rtn", overrides=overrides)
    return Packed(model, processor, prompts, pictures)


def _seeing(name: str, scheme: str) -> Packed:
    """A model with its tower packed, and pictures for it."""
    if name == SEEING:
        processor = open_processor(str(demo_model_path()))
        model = AutoModelForImageTextToText.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
        pictures = [_question(processor, row) for row in load_shapes("test", n_rows=N_PICTURES)]
    else:
        model, processor = picture_models.build(name)
        pictures = [picture_models.prompt(name, processor, seed) for seed in range(N_PROMPTS)]
    vlmq.quantize(model, [p.batch for p in pictures[:2]], scheme, solver="rtn")
    return Packed(model, processor, [], pictures)


def _question(processor: Any, row: Any) -> Prompt:
    """A row of easy-vqa as the chat template of the small model writes it."""
    before, after = "<s><|user|>", f" {row['question']}<|assistant|>"
    text = f"{before}<image>{after}"
    batch = processor(text=text, images=[row["image"]], return_tensors="pt", add_special_tokens=False)
    return Prompt(before, row["image"], after, dict(batch))


def llama() -> LlamaConfig:
    """A Llama of 1.9 million parameters, with random weights that make some tokens likelier than others."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )


def label(name: str) -> str:
    """The name to print: that of a folder without its path."""
    return name if name in MADE else Path(name).name


def _ids(processor: Any, lines: Any) -> list[Tensor]:
    tokenizer = getattr(processor, "tokenizer", processor)
    return [tokenizer(line, return_tensors="pt")["input_ids"] for line in lines]
