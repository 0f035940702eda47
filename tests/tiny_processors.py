"""Real processors for the models of tiny_models.py, built offline: a tokenizer of 200 tokens and PIL image
processors.

`FAMILIES` maps a family to the function that builds its processor; `build` makes it, `picture` makes an
image. Processors that want a video processor, which would need torchvision, are given none; SmolVLM's also
wants num2words and is left to Idefics 3, whose image processor it shares.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers as hf
from PIL import Image
from tiny_models import IMAGE_TOKEN
from tokenizers import Tokenizer, decoders, models
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

# Merges let an answer share a token with what stands before it, as in a real byte-pair tokenizer.
MERGES = ("th", "he", "in", "is", "at", "re", "ed", "ow", "\n\n")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else
message['content'] -%} {%- if message['role'] == 'assistant' -%} GENERATION_START{%- for part in parts -%}{{-
part['text'] -}}{%- endfor -%}{{- '</s>' -}}GENERATION_END{{- '\\n' -}} {%- else -%} {%- for part in parts
-%}{{- 'IMAGE' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}{{- '\\n' -}} {%- endif -%} {%-
endfor -%} {%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


def template(image: str = "", *, tags: bool = False) -> str:
    """A chat template; `tags` mark what the assistant says, `image` is written for an image."""
    start, end = ("{%- generation -%}", "{%- endgeneration -%}") if tags else ("", "")
    return TEMPLATE.replace("IMAGE", image).replace("GENERATION_START", start).replace("GENERATION_END", end)


def tokenizer(specials: dict[str, int] | None = None, **options: Any) -> hf.PreTrainedTokenizerFast:
    """Characters and a few merges, `<pad>` 0, `<s>` 1, `</s>` 2, and `specials` with their ids below 200."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *(chr(i) for i in range(32, 127)), "\n", *MERGES]
    specials = {**{role: 180 + i for i, role in enumerate(ROLES)}, **(specials or {})}
    vocab = {token: i for i, token in enumerate(tokens)} | specials
    vocab |= {f"<unused{i}>": i for i in range(len(tokens), 200) if i not in specials.values()}
    merges = [(merge[0], merge[1]) for merge in MERGES]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(specials),
        **{"model_input_names": ["input_ids", "attention_mask"], **options},
    )


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """A random RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _square(image_processor: Callable[..., Any], size: int = 28, **options: Any) -> Any:
    return image_processor(size={"height": size, "width": size}, **options)


def _without_video(processor: type, *args: Any, **options: Any) -> Any:
    """An instance of a processor class that wants a video processor, without one."""
    lenient = type(
        processor.__name__, (processor,), {"check_argument_for_proper_class": lambda self, *_: None}
    )
    return lenient(*args, video_processor=None, **options)


def _llava(tags: bool) -> Any:
    images = _square(CLIPImageProcessorPil, crop_size={"height": 28, "width": 28})
    words = tokenizer({"<image>": IMAGE_TOKEN}, padding_side="left")
    return hf.LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n", tags=tags),
    )


def _qwen2_vl(tags: bool) -> Any:
    specials = {"<|image_pad|>": 199, "<|video_pad|>": 198, "<|vision_start|>": 197, "<|vision_end|>": 196}
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84)
    chat_template = template("<|vision_start|><|image_pad|><|vision_end|>", tags=tags)
    return _without_video(hf.Qwen2VLProcessor, images, tokenizer(specials), chat_template=chat_template)


def _gemma3(tags: bool) -> Any:
    specials = {"<image_soft_token>": 199, "<start_of_image>": 198, "<end_of_image>": 197}
    names = dict(zip(("image_token", "boi_token", "eoi_token"), specials, strict=True))
    words = tokenizer(specials, extra_special_tokens=names)
    images = _square(Gemma3ImageProcessorPil)
    chat_template = template("<start_of_image>", tags=tags)
    return hf.Gemma3Processor(images, words, image_seq_length=4, chat_template=chat_template)


def _paligemma(tags: bool) -> Any:
    """Without a chat template: the answer is a suffix."""
    images = _square(SiglipImageProcessorPil)
    images.image_seq_length = 4
    words = tokenizer({"<image>": IMAGE_TOKEN}, extra_special_tokens={"image_token": "<image>"})
    return hf.PaliGemmaProcessor(images, words)


def _internvl(tags: bool) -> Any:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    specials = {"<IMG_CONTEXT>": IMAGE_TOKEN, "<img>": 198, "</img>": 197, "<video>": 196}
    words = tokenizer(specials, extra_special_tokens=names)
    images = _square(GotOcr2ImageProcessorPil)
    chat_template = template("<IMG_CONTEXT>\n", tags=tags)
    return _without_video(
        hf.InternVLProcessor, images, words, image_seq_length=4, chat_template=chat_template
    )


IDEFICS3_TOKENS = {
    "<image>": IMAGE_TOKEN,
    "<fake_token_around_image>": 198,
    "<global-img>": 197,
    "<end_of_utterance>": 196,
    **{f"<row_{i}_col_{j}>": 190 + 2 * i + j - 3 for i in (1, 2) for j in (1, 2)},
}


def _idefics3(tags: bool) -> Any:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    words = tokenizer(IDEFICS3_TOKENS)
    return hf.Idefics3Processor(images, words, image_seq_len=4, chat_template=template("<image>", tags=tags))


def _clip(tags: bool) -> Any:
    images = _square(CLIPImageProcessorPil, crop_size={"height": 28, "width": 28})
    return hf.CLIPProcessor(images, tokenizer(model_max_length=64))


def _siglip(tags: bool) -> Any:
    """Its tokenizer returns no attention mask, so captions are padded to the full length."""
    words = tokenizer(model_max_length=16, model_input_names=["input_ids"])
    return hf.SiglipProcessor(_square(SiglipImageProcessorPil), words)


def _llama(tags: bool) -> Any:
    words = tokenizer()
    words.chat_template = template(tags=tags)
    return words


FAMILIES: dict[str, Callable[[bool], Any]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "clip": _clip,
    "siglip": _siglip,
    "llama": _llama,
}


def build(family: str, *, tags: bool = False) -> Any:
    """The processor of `family` (llama: a tokenizer); with `tags`, its chat template marks the assistant's
    words."""
    return FAMILIES[family](tags)
