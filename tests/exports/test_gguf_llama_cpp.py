"""llama.cpp itself on exported files: the same probabilities as transformers on the same weights.

llama.cpp rounds the inputs of packed layers to 8 bits, so log-probabilities differ by 0.03 at the most here; rows in
the wrong order change them by 0.25, which `test_the_comparison_sees_swapped_rows` shows.
"""

import copy
import gc

import pytest
import torch
from gguf_models import LINES, byte_level, packed_text, sentencepiece

from vlmq.eval.llama_cpp import LlamaCpp
from vlmq.exports import export_model, gguf_layout

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")

PLAIN = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*PLAIN, "llava", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PROMPT = list(range(20, 60))


def difference(model, folder, to="gguf", **options):
    """Largest difference of log-probabilities over the hundred likeliest tokens."""
    export_model(model, to, folder, byte_level(), text_only=True, **options)
    engine = LlamaCpp(folder / "model.gguf")
    plain = copy.deepcopy(model).dequantize()
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    ids, found = engine.next_tokens(PROMPT, 100)
    assert len(ids) == 100
    del engine
    gc.collect()
    return float((found - expected[ids]).abs().max())


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "llava",
        "smolvlm",
        "internvl",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
    ],
)
def test_every_family_is_computed_alike(family, tmp_path):
    assert difference(packed_text(family, ("int8-sym-g32",)), tmp_path / "out") < 0.05


@pytest.mark.parametrize(
    ("scheme", "to"),
    [
        ("ternary-channel", "gguf"),
        ("ternary-channel", "gguf-small"),
        ("ternary-g64", "gguf"),
        ("ternary-g64", "gguf-small"),
        ("int2-sym-g64", "gguf-small"),
        ("int2-sym-channel", "gguf"),
        ("int3-sym-channel", "gguf"),
        ("int4-sym-g32", "gguf"),
        ("binary-sym-g128", "gguf-small"),
    ],
)
def test_every_block_type_is_computed_alike(scheme, to, tmp_path):
    assert difference(packed_text("llama-wide", (scheme,)), tmp_path / "out", to) < 0.05


def test_five_bits_and_offsets_are_computed_alike(tmp_path):
    model = packed_text("llama-wide", ("int4-g64",))
    assert difference(model, tmp_path / "offsets", convert="Q4_1") < 0.05
    for layer in model.modules():
        if getattr(layer, "zeros", None) is not None:
            layer.zeros.data.bitwise_and_(0xF0)
    assert difference(model, tmp_path / "five") < 0.05


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_scaled_rotary_positions_are_computed_alike(rope, tmp_path):
    model = packed_text("llama", ("int8-sym-g32",), rope_parameters={"rope_theta": 1e4, **rope})
    assert difference(model, tmp_path / "out") < 0.05


def test_the_comparison_sees_swapped_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_layout.TextPart, "reorder", lambda part, name, rows: rows)
    assert difference(packed_text("llama", ("int8-sym-g32",)), tmp_path / "out") > 0.15


@pytest.mark.parametrize(
    "words",
    [byte_level(), byte_level("smollm"), byte_level("llama-bpe"), byte_level("qwen2"), sentencepiece()],
)
def test_text_becomes_the_same_tokens(words, tmp_path):
    export_model(packed_text("llama"), "gguf", tmp_path / "out", words)
    engine = LlamaCpp(tmp_path / "out" / "model.gguf")
    for line in LINES:
        ids = words(line)["input_ids"]
        by_text, by_ids = (engine.complete(prompt, 8, 20) for prompt in (line, ids))
        assert by_text["usage"]["prompt_tokens"] == len(ids)
        assert by_text["choices"][0]["logprobs"] == by_ids["choices"][0]["logprobs"]
