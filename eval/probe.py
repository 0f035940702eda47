"""A probe: inputs of one forward that any model can be asked, and what the model says to it.

For a model that sees, a generated picture and a question; for a dual encoder the picture and two captions; for a
language model a text; without a processor, token ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from vlmq.calib.prompts import is_image_processor, is_tokenizer
from vlmq.eval.agreement import forward_logits, inputs_for
from vlmq.eval.dual_encoder import is_dual
from vlmq.eval.vqa import encode_questions

QUESTION = "What does the image show?"
PROMPT = "The capital of France is"
CAPTIONS = ("a photo of a cat", "a colour gradient")
N_NEW_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """Inputs of one forward, on the CPU, and what they ask, for people."""

    question: str
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a model says to a probe: logits, the tokens of its greedy answer (None of a model that cannot generate)."""

    logits: Tensor
    tokens: Tensor | None


def make_probe(model: PreTrainedModel, processor: Any, row: Mapping[str, Any] | None = None) -> Probe:
    """Make the inputs.

    Args:
        model: tells what it takes.
        processor: its own; None or an image processor alone gives token ids.
        row: mapping with "image" and "question" to ask in place of the generated picture.

    Raises:
        ValueError: a dual encoder without processor.
    """
    if is_dual(model):
        if processor is None or is_tokenizer(processor) or is_image_processor(processor):
            raise ValueError("the round-trip check of a dual encoder needs its processor: pass processor=...")
        made = processor(
            text=list(CAPTIONS), images=[picture()], padding=True, truncation=True, return_tensors="pt"
        )
        question = " / ".join(CAPTIONS)
    elif is_tokenizer(processor):
        question, made = PROMPT, processor(PROMPT, return_tensors="pt")
    elif not is_image_processor(processor):
        asked = row or {"image": picture(), "question": QUESTION}
        question, made = str(asked["question"]), encode_questions([asked], processor)
    else:
        n = min(16, model.config.get_text_config().vocab_size)
        question, made = f"token ids 0 to {n - 1}", {"input_ids": torch.arange(n)[None]}
    return Probe(question, {k: v.cpu() for k, v in made.items() if isinstance(v, Tensor)})


def picture(size: int = 96) -> Image.Image:
    """A gradient of colours, the same every time."""
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    pixels = np.stack([x * 255 // size, y * 255 // size, (x + y) * 255 // (2 * size)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@torch.inference_mode()
def answer(model: PreTrainedModel, probe: Probe) -> Outcome:
    """Logits and the greedy answer, on the CPU."""
    logits, tokens = forward_logits(model, probe.inputs).cpu(), None
    if model.can_generate() and "input_ids" in probe.inputs:
        generate: Any = model.generate
        output = generate(**inputs_for(model, probe.inputs), max_new_tokens=N_NEW_TOKENS, do_sample=False)
        tokens = output[:, probe.inputs["input_ids"].shape[1] :].cpu()
    return Outcome(logits, tokens)
