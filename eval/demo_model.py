"""The parts of the small model that ships with vlmq: tokenizer, image processor, chat template, architecture.

The model is an ordinary `LlavaForConditionalGeneration` of 4.6 million parameters: a SigLIP tower (64 patches
of 8 x 8 pixels), LLaVA's two-layer projector and a Llama decoder with grouped queries and tied embeddings.

The tokenizer is a byte-level BPE of 512 tokens, trained on the 107 questions and 13 answers of easy-vqa and
on common English words; any text can be encoded, and every word of easy-vqa is one token. Text is lower
case. A chat reads `<s><|user|><image> what color is the shape?<|assistant|> red</s>`, `<image>` 64 times.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE_SIZE = 64
PATCH_SIZE = 8
N_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|' + message['role'] + '|>' -}}
  {%- if message['content'] is string -%}
    {%- set parts = [{'type': 'text', 'text': message['content']}] -%}
  {%- else -%}
    {%- set parts = message['content'] -%}
  {%- endif -%}
  {%- for part in parts if part['type'] == 'image' -%}
    {{- '<image>' -}}
  {%- endfor -%}
  {%- for part in parts if part['type'] == 'text' -%}
    {%- if message['role'] == 'assistant' -%}
      {%- generation -%}{{- ' ' + part['text'] | trim + eos_token -}}{%- endgeneration -%}
    {%- else -%}
      {{- ' ' + part['text'] | trim -}}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
COMMON_WORDS = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by not
but some what there we can out other were all your when up use word how said an each she which do their time
if will way about many then them would write like so these her long make thing see him two has look more day
could go come did my sound no most number who over know water than call first people may down side been now
find any new work part take get place made live where after back little only round man year came show every
good me give our under name very through just form much great think say help low line before turn cause same
mean differ move right boy old too does tell sentence set three want air well also play small end put home
read hand port large spell add even land here must big high such follow act why ask men change went light
kind off need house picture try us again animal point mother world near build self earth father image photo
describe answer question yes left top bottom center middle corner bright dark color shape circle rectangle
triangle square white orange purple pink shown visible background object
"""


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer: byte-level BPE on `texts` and a list of common words, lower case.

    Args:
        texts: sentences whose words shall become single tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The repetition puts the words of the texts before all pairs of letters of the common words.
    sentences = [f" {text.strip()}" for text in sorted(set(texts))] * 100
    sentences += [f" {word}" for word in COMMON_WORDS.split()]
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(texts: Sequence[str]) -> LlavaProcessor:
    """Image processor, tokenizer and chat template in one."""
    image_processor = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(texts),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """The model with random weights, float32."""
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        hidden_size=160,
        intermediate_size=560,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=544,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=N_IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.max_new_tokens, generation.do_sample = 8, False
    return model
