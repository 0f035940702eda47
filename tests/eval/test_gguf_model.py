"""GGUF files, read back with gguf's own reader: the weights of the model, in the places where llama.cpp looks."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import LlamaConfig, LlamaForCausalLM

import vlmq
from vlmq.eval.gguf_model import LAYERS, block_of, interleave_halves, write_gguf
from vlmq.eval.presets import PRESETS, build_preset

N_HEADS = 4


@pytest.fixture
def preset(monkeypatch):
    """A Llama whose layers are as wide as a block of the ternary types."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 300}
    config = LlamaConfig(
        num_attention_heads=N_HEADS, num_key_value_heads=2, tie_word_embeddings=False, **sizes
    )
    monkeypatch.setitem(PRESETS, "llama-test", lambda: config)
    return "llama-test"


def read(path):
    """Tensors of the file, dequantized by gguf, and its fields."""
    reader = GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    return tensors, types, {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize(
    ("scheme", "layer_type"), [("ternary-g64", "TQ2_0"), ("ternary-channel", "TQ1_0"), ("int4-g64", "Q4_0")]
)
def test_the_file_holds_the_weights_of_the_packed_model(preset, scheme, layer_type, tmp_path):
    model = build_preset(preset, scheme)
    vlmq.quantization.pack_embeddings(model, "int8-g64")
    write_gguf(model, layer_type, tmp_path / "model.gguf")
    tensors, types, _ = read(tmp_path / "model.gguf")
    assert len(tensors) == 3 + 2 * (len(LAYERS) + 2)
    for i in range(2):
        for name, short in LAYERS.items():
            weight = model.get_submodule(f"model.layers.{i}.{name}").dequantize().numpy()
            if short in ("attn_q", "attn_k"):
                weight = interleave_halves(weight, N_HEADS if short == "attn_q" else 2)
            written = tensors[f"blk.{i}.{short}.weight"]
            step = np.abs(weight).max()
            tolerance = 0 if layer_type.startswith("TQ") else step / 8 + 1e-6
            assert np.abs(written - weight).max() <= tolerance
            assert types[f"blk.{i}.{short}.weight"] == layer_type
    head = model.lm_head.dequantize().numpy()
    assert types["output.weight"] == types["token_embd.weight"] == "Q8_0"
    assert np.abs(tensors["output.weight"] - head).max() < np.abs(head).max() / 127


def test_rows_of_a_head_alternate_between_its_halves():
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert interleave_halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_header_holds_the_shapes_and_a_token_for_each_id(preset, tmp_path):
    write_gguf(build_preset(preset, None), "Q8_0", tmp_path / "model.gguf")
    _, _, fields = read(tmp_path / "model.gguf")
    assert fields["llama.embedding_length"] == 256
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 10000
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 300
    assert tokens[299] == "\u2581299"


def test_block_sizes_are_those_of_the_types():
    assert {name: block_of(name) for name in ("TQ2_0", "TQ1_0", "Q4_0", "Q8_0")} == {
        "TQ2_0": (256, 66),
        "TQ1_0": (256, 54),
        "Q4_0": (32, 18),
        "Q8_0": (32, 34),
    }


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="TQ2_0 takes widths of 256 n, got 128"):
        write_gguf(build_preset("llama-tiny", None), "TQ2_0", tmp_path / "model.gguf")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    tied = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, tie_word_embeddings=True, **sizes))
    with pytest.raises(ValueError, match="a head of its own"):
        write_gguf(tied, "Q8_0", tmp_path / "model.gguf")


@pytest.mark.parametrize("scheme", ["ternary-g64", "int4-g64"])
def test_llama_cpp_computes_the_same_first_tokens(preset, scheme, tmp_path):
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    from vlmq.eval.engines import Spec, start

    model = build_preset(preset, scheme)
    layer_type = "TQ2_0" if scheme.startswith("ternary") else "Q8_0"
    write_gguf(model, layer_type, tmp_path / "model.gguf")
    prompt = list(range(20, 60))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    with start(Spec("llama.cpp", str(tmp_path / "model.gguf"), 1, prompt, 2)) as engine:
        first = engine.run()["tokens"][0]
    assert (logits > logits[first] + 0.05 * logits.std()).sum() == 0
