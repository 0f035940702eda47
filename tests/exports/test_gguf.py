"""GGUF files, read by the package gguf and by transformers: weights bit by bit, sizes, tokenizer."""

import copy

import numpy as np
import pytest
import torch
from gguf_models import LINES, N_ROWS, PLAIN, byte_level, packed_text, read_file, sentencepiece
from installed import needs_transformers
from packed_models import packed
from tiny_processors import tokenizer
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlmq
from vlmq.exports import export_model
from vlmq.exports.gguf_layout import LAYERS, text_part
from vlmq.exports.gguf_vocabulary import vocabulary

N_HEADS, N_KV_HEADS = 4, 2


def alternate(weight, n_heads):
    """Rows of each head from (first half, second half) to one of each in turn, by a loop."""
    size = len(weight) // n_heads
    order = [
        h * size + half * size // 2 + i for h in range(n_heads) for i in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("llava", "llama"),
        ("smolvlm", "llama"),
        ("idefics3", "llama"),
        ("mistral3", "llama"),
        ("internvl", "qwen2"),
        ("qwen2_vl", "qwen2vl"),
        ("qwen2_5_vl", "qwen2vl"),
        ("qwen3_vl", "qwen3vl"),
    ],
)
def test_the_file_holds_the_weights_of_the_text_part(family, architecture, tmp_path):
    model = packed_text(family, ("int4-sym-g32", "ternary-g64", "int8-sym-channel"))
    export = export_model(model, "gguf", tmp_path / "out", byte_level(), text_only=True)
    tensors, types, fields = read_file(tmp_path / "out" / "model.gguf")
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.attention.head_count_kv"] == N_KV_HEADS
    assert fields[f"{architecture}.vocab_size"] == N_ROWS
    decoder = text_part(model).decoder
    is_tied = model.lm_head.weight is decoder.embed_tokens.weight
    seen = {"token_embd.weight", "output_norm.weight"} | (set() if is_tied else {"output.weight"})
    assert np.array_equal(tensors["token_embd.weight"], decoder.embed_tokens.weight.detach().numpy())
    for i, layer in enumerate(decoder.layers):
        modules = dict(layer.named_modules())
        for name, short in LAYERS.items():
            if name not in modules:
                continue
            for leaf in ("weight", "bias"):
                tensor = getattr(modules[name], leaf, None)
                if tensor is None:
                    continue
                if architecture == "llama" and short in ("attn_q", "attn_k"):
                    tensor = alternate(tensor, N_HEADS if short == "attn_q" else N_KV_HEADS)
                seen.add(f"blk.{i}.{short}.{leaf}")
                assert np.array_equal(tensors[f"blk.{i}.{short}.{leaf}"], tensor.detach().numpy())
                if leaf == "weight" and tensor.ndim == 2:
                    assert types[f"blk.{i}.{short}.weight"] in ("Q4_0", "Q8_0")
    assert seen == set(tensors)
    assert sum(export.layers.values()) == 14
    assert any("vision tower" in note for note in export.notes) == (family not in (*PLAIN, "llama"))


@pytest.mark.parametrize(
    ("family", "schemes"),
    [
        ("llama-wide", ("ternary-channel", "int4-sym-g64")),
        ("qwen2", ("int8-sym-g32",)),
        ("qwen3", ("ternary-g64",)),
    ],
)
def test_transformers_loads_the_same_values(family, schemes, tmp_path):
    model = packed_text(family, schemes)
    export_model(model, "gguf", tmp_path / "out", byte_level())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    plain = copy.deepcopy(model).dequantize()
    expected = plain.state_dict()
    assert {name for name, t in loaded.state_dict().items() if not torch.equal(t, expected[name])} == set()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():  # epsilon of the norms is a float32 in the file
        assert torch.allclose(loaded(ids).logits, plain(ids).logits, atol=1e-4)


@needs_transformers("5.18", "adds words of its own to a tokenizer that it reads")
@pytest.mark.parametrize(
    "words", [byte_level(), byte_level("llama-bpe"), byte_level("qwen2"), sentencepiece()]
)
def test_transformers_reads_the_same_tokenizer(words, tmp_path):
    words = copy.deepcopy(words)
    words.chat_template = "{{ messages[0]['content'] }}"
    export_model(packed_text("llama"), "gguf", tmp_path / "out", words)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    ids = [words(line, add_special_tokens=False)["input_ids"] for line in LINES]
    assert [loaded(line, add_special_tokens=False)["input_ids"] for line in LINES] == ids
    assert loaded.chat_template == words.chat_template
    assert loaded.eos_token_id == words.eos_token_id


def test_tied_and_packed_embeddings(tmp_path):
    model = packed_text("llama", tie_word_embeddings=True)
    vlmq.quantization.pack_embeddings(model, "int8-sym-g64")
    export_model(model, "gguf", tmp_path / "out", byte_level())
    tensors, types, _ = read_file(tmp_path / "out" / "model.gguf")
    assert "output.weight" not in tensors
    assert types["token_embd.weight"] == "Q8_0"
    assert np.array_equal(tensors["token_embd.weight"], model.lm_head.dequantize().numpy())


def test_embeddings_that_no_block_can_say_are_written_in_the_models_dtype(tmp_path):
    model = packed_text("llama")
    vlmq.quantization.pack_embeddings(model, "int4-g32")
    export_model(model, "gguf", tmp_path / "out", byte_level())
    tensors, types, _ = read_file(tmp_path / "out" / "model.gguf")
    assert types["token_embd.weight"] == types["output.weight"] == "F32"
    assert np.array_equal(tensors["output.weight"], model.lm_head.dequantize().numpy())


def test_a_conversion_to_offsets_is_measured(tmp_path):
    model = packed_text("llama", ("int4-g64", "int4-sym-g32"))
    with pytest.raises(ValueError, match=r"cannot say layer .*between two whole numbers.*Q4_1"):
        export_model(model, "gguf", tmp_path / "out", byte_level())
    export = export_model(model, "gguf", tmp_path / "out", byte_level(), convert="Q4_1")
    tensors, types, _ = read_file(tmp_path / "out" / "model.gguf")
    assert types["blk.0.ffn_gate.weight"] == "Q4_1"
    changed = total = 0.0
    for i, layer in enumerate(model.model.layers):
        for name, short in LAYERS.items():
            module = layer.get_submodule(name) if "norm" not in name else None
            if module is None or module.zeros is None:
                continue
            before = module.dequantize()
            if short in ("attn_q", "attn_k"):
                before = alternate(before, N_HEADS if short == "attn_q" else N_KV_HEADS)
            changed += float((torch.from_numpy(tensors[f"blk.{i}.{short}.weight"]) - before).square().sum())
            total += float(before.square().sum())
    assert export.n_converted == 7
    assert export.error == pytest.approx((changed / total) ** 0.5, rel=1e-4)
    assert 0 < export.error < 1e-3


def test_small_files_are_smaller_and_say_who_reads_them(tmp_path):
    model = packed_text("llama-wide", ("ternary-g64",))
    wide = export_model(model, "gguf", tmp_path / "wide", byte_level())
    small = export_model(model, "gguf-small", tmp_path / "small", byte_level())
    assert wide.layers == {"Q4_0, 4.5 bits": 14}
    assert small.layers == {"Q2_0, 2.25 bits": 14}
    assert any("4.5 bits" in note for note in wide.notes)
    assert any("llama.cpp of 2026" in note for note in small.notes)
    sizes = [(tmp_path / name / "model.gguf").stat().st_size for name in ("wide", "small")]
    n_weights = sum(layer.in_features * layer.out_features for layer in vlmq_layers(model))
    assert sizes[0] - sizes[1] == pytest.approx(n_weights * 2.25 / 8, rel=0.01)


def vlmq_layers(model):
    return [module for module in model.modules() if isinstance(module, vlmq.linear.QuantLinear)]


def test_llama_3_frequencies_and_the_sliding_window(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = packed_text("llama", rope_parameters=rope)
    export_model(model, "gguf", tmp_path / "out", byte_level())
    tensors, _, _ = read_file(tmp_path / "out" / "model.gguf")
    factors = tensors["rope_freqs.weight"]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)
    export = export_model(packed_text("mistral"), "gguf", tmp_path / "window", byte_level())
    _, _, fields = read_file(tmp_path / "window" / "model.gguf")
    assert fields["llama.context_length"] == 128
    assert any("sliding window of 128" in note for note in export.notes)


@pytest.mark.parametrize(
    ("family", "options", "words", "message"),
    [
        ("gemma3", {}, byte_level(), "this model's is 'gemma3_text'"),
        ("llama", {"hidden_act": "gelu"}, byte_level(), "with silu, this one has 'gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            byte_level(),
            "dyn",
        ),
        (
            "qwen3",
            {"attention_bias": True},
            byte_level(),
            r"no place for 8 tensors such as blk.0.attn_q.bias",
        ),
        ("llama", {}, None, "holds the tokenizer: expected"),
        ("llama", {}, tokenizer(), "no name for the way in which this tokenizer cuts text"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(family, options, words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(packed_text(family, **options), "gguf", tmp_path / "out", words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "note"), [(normalizers.NFC, "form NFC"), (normalizers.Lowercase, "letters small")]
)
def test_a_normalization_is_noted(kind, note):
    words = copy.deepcopy(byte_level())
    words.backend_tokenizer.normalizer = kind()
    assert note in vocabulary(words, N_ROWS).notes[0]


def test_other_normalizations_are_refused():
    words = copy.deepcopy(byte_level())
    words.backend_tokenizer.normalizer = normalizers.StripAccents()
    with pytest.raises(ValueError, match="normalizes no text, the tokenizer does"):
        vocabulary(words, N_ROWS)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="token 311, the embedding has 200 rows"):
        vocabulary(byte_level(), 200)


def test_dual_encoders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="text part of"):
        export_model(packed("clip", ("int4-sym-g32",)), "gguf", tmp_path / "out", byte_level())


def test_a_file_is_replaced_and_what_lies_beside_it_stays(tmp_path):
    export_model(packed_text("llama"), "gguf", tmp_path / "out", byte_level())
    (tmp_path / "out" / "notes.txt").write_text("mine")
    export_model(packed_text("llama", ("int8-sym-g32",)), "gguf", tmp_path / "out", byte_level())
    assert read_file(tmp_path / "out" / "model.gguf")[1]["blk.0.attn_v.weight"] == "Q8_0"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.gguf", "notes.txt"]
