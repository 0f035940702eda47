"""The parts of the small CLIP that ships with vlmq: tokenizer, image processor, architecture.

An ordinary `CLIPModel` of 1.5 million parameters: 4 vision blocks and 3 text blocks of width 128, pictures of 64 x 64
pixels in 64 patches of 8 x 8. The tokenizer is a byte-level BPE whose words are those of the scenes' captions
(`scenes.py`) and of a list of common English words, so that any text can be encoded; text is lower case.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmq.eval.demo_model import COMMON_WORDS

IMAGE_SIZE = 64
PATCH_SIZE = 8
MAX_TOKENS = 32
# The end token must not have id 2: CLIPTextModel reads that as a sign of its oldest checkpoints.
SPECIAL_TOKENS = ("<pad>", "<s>", "<unk>", "</s>")


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `texts`, whose words become single tokens, and on a list of common words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [text.strip() for text in sorted(set(texts))] * 100 + COMMON_WORDS.split()
    tokenizer.train_from_iterator(sentences, trainer)
    start, end = ((t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", special_tokens=[start, end]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_processor(texts: Sequence[str]) -> CLIPProcessor:
    """Image processor and tokenizer in one."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=build_tokenizer(texts))


def build_model(processor: CLIPProcessor, seed: int) -> CLIPModel:
    """The model with random weights, float32."""
    tokenizer = processor.tokenizer
    shared = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 96}
    text = {
        **shared,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(config)
