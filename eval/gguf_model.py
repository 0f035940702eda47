"""A Llama model as a GGUF file, so that llama.cpp can be timed on the weights that vlmq has packed.

    W, dequantized where it is packed -> blocks of one GGUF type (gguf.quants)

The layers in the blocks take one type (`layer_type`), token embedding and output head `HEAD_TYPE`, norms float32.
llama.cpp rotates neighbouring elements of a head where transformers rotates its halves, so the rows of q and k are
reordered. Ternary weights with one scale per block of 256 survive TQ1_0 and TQ2_0 exactly; Q4_0 rounds anew.

The vocabulary is made up: token i is the text "i", so that token ids can be read from what llama.cpp answers. Not for
other families, nor for use with a real tokenizer.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import LlamaConfig, PreTrainedModel

from vlmq.embedding import QuantEmbedding
from vlmq.linear import QuantLinear

HEAD_TYPE = "Q8_0"
LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
N_SPECIAL_TOKENS = 3


def write_gguf(model: PreTrainedModel, layer_type: str, path: Path) -> None:
    """Write the model; the quantized weights are in memory until the file is closed.

    Args:
        model: a Llama with an output head of its own, packed or not.
        layer_type: GGUF type of the layers in the blocks, such as "TQ2_0".
        path: file to write.

    Raises:
        ValueError: a model that is no such Llama, or a type that gguf cannot write at these widths.
    """
    config = model.config
    if not isinstance(config, LlamaConfig) or config.tie_word_embeddings:
        raise ValueError(f"expected a Llama with a head of its own, got {type(config).__name__}")
    writer = GGUFWriter(path, "llama")
    _add_header(writer, config)
    _add(writer, "token_embd", weight_of(model, "model.embed_tokens"), HEAD_TYPE)
    _add(writer, "output", weight_of(model, "lm_head"), HEAD_TYPE)
    _add(writer, "output_norm", weight_of(model, "model.norm"), "F32")
    n_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i in range(config.num_hidden_layers):
        for name, short in LAYERS.items():
            weight = weight_of(model, f"model.layers.{i}.{name}")
            if short in n_heads:
                weight = interleave_halves(weight, n_heads[short])
            _add(writer, f"blk.{i}.{short}", weight, layer_type)
        for name, short in NORMS.items():
            _add(writer, f"blk.{i}.{short}", weight_of(model, f"model.layers.{i}.{name}"), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weight_of(model: PreTrainedModel, name: str) -> np.ndarray:
    """Weight of the module of that path in float32, dequantized where it is packed."""
    module = model.get_submodule(name)
    if isinstance(module, QuantEmbedding):
        module = module.rows
    if isinstance(module, QuantLinear):
        return module.dequantize(torch.float32).numpy()
    return module.get_parameter("weight").detach().float().numpy()


def interleave_halves(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder the rows of each head from (first half, second half) to pairs of one of each."""
    n_rows, width = weight.shape
    halves = weight.reshape(n_heads, 2, n_rows // n_heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(n_rows, width)


def block_of(type_name: str) -> tuple[int, int]:
    """Weights in a block of that GGUF type, and its bytes."""
    return gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]


def _add_header(writer: GGUFWriter, config: LlamaConfig) -> None:
    """Shapes, and a vocabulary of made-up tokens."""
    n_heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // n_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    n_plain = config.vocab_size - N_SPECIAL_TOKENS
    plain = [f"\u2581{i}" for i in range(N_SPECIAL_TOKENS, config.vocab_size)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *plain])
    writer.add_token_scores([0.0] * config.vocab_size)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * n_plain])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add(writer: GGUFWriter, name: str, weight: np.ndarray, type_name: str) -> None:
    type_ = GGMLQuantizationType[type_name]
    n_block, _ = block_of(type_name)
    if weight.shape[-1] % n_block:
        raise ValueError(f"{name}: {type_name} takes widths of {n_block} n, got {weight.shape[-1]}")
    writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, type_), raw_dtype=type_)
