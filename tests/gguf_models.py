"""Tiny packed models with tokenizers that llama.cpp knows, for the tests of the export to GGUF."""

from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import transformers as hf
from gguf import GGUFReader, quants
from packed_models import block_linears, pack_layers
from tiny_models import FAMILIES, TEXT, from_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel

from vlmq.attach import attach
from vlmq.exports.gguf_vocabulary import PRE

N_ROWS = 330
N_TOKENS = 320
LINES = (
    "The red circle is in the image, isn't it?\n",
    "What colour is the 12th square?  It's 345 blue ones!",
)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": N_ROWS}
PLAIN = {
    "llama-wide": lambda: hf.LlamaConfig(**{**TEXT, **WIDE}),
    "mistral": lambda: hf.MistralConfig(**TEXT, sliding_window=128),
    "qwen2": lambda: hf.Qwen2Config(**TEXT),
    "qwen3": lambda: hf.Qwen3Config(**{**TEXT, "head_dim": 128}),
}


@cache
def byte_level(cut: str = "gpt-2") -> hf.PreTrainedTokenizerFast:
    """A tokenizer of 320 tokens, all bytes among them, that cuts text as llama.cpp does under that name."""
    steps: list[Any] = [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in ("gpt-2", "smollm"))
    ]
    if cut == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif cut != "gpt-2":
        (regex,) = (regex for regex, name in PRE.items() if name == cut)
        steps.insert(0, pre_tokenizers.Split(Regex(regex), "isolated"))
    core = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<|endoftext|>", "<s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS, initial_alphabet=alphabet, special_tokens=names, show_progress=False
    )
    core.train_from_iterator(LINES * 3, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@cache
def sentencepiece() -> hf.PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: bytes as tokens, spaces as letters, a token at the start of each text."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    core.train_from_iterator([line.replace("\n", "") for line in LINES] * 3, trainer)
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    core.post_processor = None
    return words


def packed_text(
    family: str, schemes: tuple[str, ...] = ("int4-sym-g32",), **text_options: Any
) -> PreTrainedModel:
    """A model with 330 rows in its embedding, the linear layers of all blocks packed, the schemes in turn."""
    config = (PLAIN | FAMILIES)[family]()
    text = config.get_text_config()
    text.vocab_size = N_ROWS
    for name, value in text_options.items():
        setattr(text, name, value)
    auto: Any = hf.AutoModelForCausalLM if text is config else hf.AutoModelForImageTextToText
    model = from_config(auto, config)
    chosen = dict(zip(block_linears(model), cycle(schemes), strict=False))
    pack_layers(model, chosen)
    attach(model, chosen, {"seed": 0, "calibration": "none"})
    return model


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Tensors of the file, dequantized by the package gguf, their types, and the other fields."""
    reader = GGUFReader(path)
    tensors = {t.name: quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    return tensors, types, {name: field.contents() for name, field in reader.fields.items()}
