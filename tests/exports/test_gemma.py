"""Folders in transformers' own "gemma" format, loaded by transformers: the same weights, bit by bit."""

import copy
import json

import pytest
import torch
from packed_models import auto_class, logits, packed, read_tensors

import vlmq
from vlmq.exports import export_model
from vlmq.exports.writing import packed_layers

SCHEMES = (
    "ternary-channel",
    "int4-sym-channel",
    "int3-sym-channel",
    "binary-sym-channel",
    "int8-sym-channel",
)


@pytest.mark.parametrize(
    ("family", "schemes"),
    [
        ("llama", ("ternary-channel",)),
        ("llama", SCHEMES),
        ("llava", SCHEMES),
        ("qwen3_vl", ("int2-sym-channel",)),
        ("clip", ("ternary-channel", "int4-sym-channel")),
    ],
)
def test_transformers_loads_the_same_values(family, schemes, tmp_path):
    model = packed(family, schemes, torch.float32)
    export_model(model, "gemma", tmp_path / "out")
    loaded = auto_class(family).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for name, layer in packed_layers(model).items():
        assert torch.equal(loaded.get_submodule(name)._dequantize_weights(torch.float32), layer.dequantize())
    expected = logits(copy.deepcopy(model).dequantize(), family)
    assert torch.allclose(logits(loaded, family), expected, rtol=1e-5, atol=1e-6)


def test_ternary_layers_take_two_bits_and_others_their_own(tmp_path):
    model = packed("llama", ("ternary-channel", "ternary-channel", "int3-sym-channel"), torch.float32)
    export = export_model(model, "gemma", tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["num_bits"] == 2
    assert set(map(str, block["module_quant_configs"].values())) == {"{'num_bits': 4}"}
    assert block["modules_to_not_convert"] == ["lm_head$"]
    tensors = read_tensors(tmp_path / "out")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (64, 16)
    assert tensors["model.layers.0.self_attn.v_proj.weight"].shape == (32, 32)
    assert any("cannot save it again" in note for note in export.notes)


def test_a_layer_of_one_group_has_one_scale_per_channel(tmp_path):
    model = packed("llama", ("int4-sym-g128",), torch.float32)
    export_model(model, "gemma", tmp_path / "out")
    loaded = auto_class("llama").from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, "llama"), logits(copy.deepcopy(model).dequantize(), "llama"))


def test_packed_embeddings_are_written_in_full_precision(tmp_path):
    model = packed("llama", ("ternary-channel",), torch.float32)
    vlmq.quantization.pack_embeddings(model, "int8-g64")
    export_model(model, "gemma", tmp_path / "out")
    loaded = auto_class("llama").from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, "llama"), logits(copy.deepcopy(model).dequantize(), "llama"))


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("ternary-g32", "groups of 32, the format has one scale"),
        ("int8-channel", "zero points"),
        ("ternary2-g32", "planes"),
    ],
)
def test_what_has_more_than_a_scale_per_channel_is_refused(scheme, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export_model(packed("llama", (scheme,)), "gemma", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
