"""GPTQ folders, read by a second, plain reading of the layout, and by vlmq's import."""

import json
import re

import pytest
import torch
from packed_models import packed, read_tensors
from tiny_models import build, inputs

import vlmq
from vlmq.exports import export_model
from vlmq.exports.writing import packed_layers


def bits_of(words, bits, n):
    """The n numbers of one list of words, by arithmetic on one big integer."""
    whole = sum((word % 2**32) << (32 * j) for j, word in enumerate(words))
    return [(whole >> (bits * k)) % 2**bits for k in range(n)]


def read_by_hand(tensors, name, bits):
    """The weight, element by element as the layout says."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")
    )
    n_in, n_out = len(g_idx), scales.shape[1]
    codes = [bits_of(column, bits, n_in) for column in qweight.T.tolist()]
    zeros = [bits_of(row, bits, n_out) for row in qzeros.tolist()]
    weight = torch.empty(n_out, n_in)
    for o in range(n_out):
        for i in range(n_in):
            g = int(g_idx[i])
            weight[o, i] = scales[g, o].float() * (codes[o][i] - (zeros[g][o] + 1))
    return weight


@pytest.mark.parametrize(
    ("schemes", "bits", "size"),
    [
        (("int4-sym-g32",), 4, 32),
        (("int3-sym-g16", "ternary-g32"), 3, 16),
        (("int8-sym-channel", "int2-sym-g64"), 8, 32),
        (("ternary-channel",), 2, -1),
    ],
)
def test_the_layout_says_the_same_values(schemes, bits, size, tmp_path):
    model = packed("llama", schemes, torch.float32)
    export_model(model, "gptq", tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (block["bits"], block["group_size"], block["sym"]) == (bits, size, True)
    assert block["dynamic"] == {r"-:^lm_head$": {}}
    tensors = read_tensors(tmp_path / "out")
    for name in list(packed_layers(model))[:2]:
        assert torch.equal(read_by_hand(tensors, name, bits), model.get_submodule(name).dequantize())
    loaded = vlmq.load(tmp_path / "out", dtype=torch.float32)
    for name, layer in packed_layers(model).items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), layer.dequantize())


def test_zero_points_on_levels_are_kept(tmp_path):
    model = packed("llama", ("int4-g32",), torch.float32)
    for layer in packed_layers(model).values():
        layer.zeros.data.bitwise_and_(0xF0).clamp_(min=16)
    export_model(model, "gptq", tmp_path / "out")
    loaded = vlmq.load(tmp_path / "out", dtype=torch.float32)
    for name, layer in packed_layers(model).items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), layer.dequantize())


def test_a_zero_point_of_zero_is_refused(tmp_path):
    model = packed("llama", ("int4-g32",), torch.float32)
    for layer in packed_layers(model).values():
        layer.zeros.data.zero_()
    with pytest.raises(ValueError, match="would store as -1"):
        export_model(model, "gptq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("convert", [None, "int4-sym-g32"])
def test_sizes_that_do_not_fill_words_are_refused_with_what_helps(convert, tmp_path):
    reason = (
        r"'text_model.encoder.layers.0.mlp.fc1' of any scheme: its sizes \(48, 32\) are no multiples of 32"
    )
    with pytest.raises(ValueError, match=reason) as refused:
        export_model(packed("clip", ("int4-sym-g16",)), "gptq", tmp_path / "out", convert=convert)
    assert "convert" not in str(refused.value)
    (pattern,) = re.findall("override of None to '(.+?)'", str(refused.value))
    overrides = {pattern.replace("text", "*").replace("fc1", "fc?"): None}
    model = build("clip")
    vlmq.quantize(model, inputs("clip", 1), "int4-sym-g16", solver="rtn", overrides=overrides)
    export_model(model, "gptq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
