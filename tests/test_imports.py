"""Checkpoints of other formats in packed layers: the values that an independent reading of the format gives."""

import json

import pytest
import torch
from packed_models import block_linears, logits, packed, read_tensors
from safetensors.torch import save_file
from tiny_models import build
from torch import nn

import vlmq
from vlmq.exports import export_model
from vlmq.foreign import read_awq
from vlmq.linear import QuantLinear


def pack_line(numbers, bits):
    """Words of 32 bits of one list of numbers, low bits first."""
    whole = sum(int(number) << (bits * k) for k, number in enumerate(numbers))
    words = [(whole >> (32 * j)) % 2**32 for j in range(-(-len(numbers) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def pack_rows(numbers, bits):
    return torch.tensor([pack_line(line, bits) for line in numbers.tolist()], dtype=torch.int32)


def pack_awq(numbers):
    """(rows, columns) -> words of eight columns, laid out for AWQ's kernel.

    That kernel takes two neighbouring columns at once, out of the low and the high half of a word: of each eight, the
    even columns fill the low 16 bits and the odd ones the high 16 bits, first columns lowest.
    """
    words = []
    for row in numbers.tolist():
        line = [0] * (len(row) // 8)
        for column, number in enumerate(row):
            pair, is_odd = divmod(column % 8, 2)
            line[column // 8] |= int(number) << (16 * is_odd + 4 * pair)
        words.append([word - 2**32 if word >= 2**31 else word for word in line])
    return torch.tensor(words, dtype=torch.int32)


def write(folder, method, bits=4, size=32, symmetric=False, **changes):
    """A Llama in GPTQ or AWQ, and the weights that it stands for."""
    model = build("llama", torch.float32)
    layers = block_linears(model)
    tensors = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in layers}
    weights = {}
    for name in layers:
        out, width = model.get_submodule(name).weight.shape
        codes = torch.randint(0, 2**bits, (out, width))
        groups = width // size
        zeros = (
            torch.full((out, groups), 2 ** (bits - 1))
            if symmetric
            else torch.randint(1, 2**bits, (out, groups))
        )
        scales = (torch.rand(out, groups) * 0.05 / 2**bits + 0.001).half()
        expand = torch.arange(width) // size
        weights[name] = scales.float()[:, expand] * (codes - zeros[:, expand]).float()
        tensors[f"{name}.scales"] = scales.T.contiguous()
        if method == "gptq":
            tensors[f"{name}.qweight"] = pack_rows(codes, bits).T.contiguous()
            tensors[f"{name}.qzeros"] = pack_rows((zeros - 1).T, bits)
            tensors[f"{name}.g_idx"] = expand.int()
        else:
            tensors[f"{name}.qweight"] = pack_awq(codes.T)
            tensors[f"{name}.qzeros"] = pack_awq(zeros.T)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    block = {"quant_method": method, "bits": bits, "group_size": size} | changes
    config |= {"quantization_config": block, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, weight in weights.items():
        model.get_submodule(name).weight = nn.Parameter(weight)
    return model, weights


@pytest.mark.parametrize(
    ("method", "bits", "size", "symmetric"),
    [("gptq", 4, 32, True), ("gptq", 4, 16, False), ("gptq", 3, 32, False), ("gptq", 2, 16, False)]
    + [("gptq", 8, 32, True), ("awq", 4, 32, False), ("awq", 4, 16, True)],
)
def test_gptq_and_awq_load_with_the_same_values(method, bits, size, symmetric, tmp_path):
    reference, weights = write(tmp_path, method, bits, size, symmetric)
    model = vlmq.load(tmp_path, dtype=torch.float32)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert layer.format.name == f"int{bits}{'-sym' if symmetric else ''}"
        assert torch.equal(layer.dequantize(), weight)
    assert torch.allclose(logits(model, "llama"), logits(reference, "llama"), atol=0.1)
    vlmq.save(model, tmp_path / "own")
    again = vlmq.load(tmp_path / "own")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    assert again.config.quantization_config.metadata == {"imported_from": method}


def test_awq_columns_are_in_the_order_that_its_packers_write():
    """A word of the columns 0 to 7 holding 0 to 7 is 0x75316420."""
    numbers = torch.arange(8).repeat(16, 1)
    assert pack_awq(numbers).unique().tolist() == [0x75316420]
    tensors = {
        "qweight": torch.full((16, 1), 0x75316420, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    assert torch.equal(read_awq(tensors, 16, 4).dequantize(), numbers.T.float())


@pytest.mark.parametrize("family", ["llama", "llava", "qwen3_vl", "siglip"])
def test_what_was_exported_comes_back(family, tmp_path):
    schemes = ("int4-sym-g16", "int8-channel", "int3-sym-g32", "ternary-channel")
    model = packed(family, schemes, torch.float32)
    export_model(model, "compressed-tensors", tmp_path / "out")
    loaded = vlmq.load(tmp_path / "out")
    for name in model.config.quantization_config.schemes():
        layer = loaded.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert torch.equal(layer.dequantize(), model.get_submodule(name).dequantize())


def change(folder, edit):
    tensors = read_tensors(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"].flip(0)}), "act-order"),
        (lambda t: t.update({f"{Q}.qzeros": torch.full_like(t[f"{Q}.qzeros"], -1)}), "wrapped around"),
        (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float() * 1.00001}), "float16"),
        (lambda t: t.update({f"{Q}.x.qweight": t[f"{Q}.qweight"].clone()}), "no linear layer"),
    ],
)
def test_what_cannot_be_said_is_refused_with_the_layer(edit, message, tmp_path):
    write(tmp_path, "gptq")
    change(tmp_path, edit)
    with pytest.raises(ValueError, match=rf"{Q}.*{message}"):
        vlmq.load(tmp_path)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("awq", {"version": "gemv"}, "'gemv' is not read"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin' is not"),
    ],
)
def test_other_layouts_are_refused(method, changes, message, tmp_path):
    write(tmp_path, method, **changes)
    with pytest.raises(ValueError, match=message):
        vlmq.load(tmp_path)


def test_quantized_activations_are_refused(tmp_path):
    export_model(packed("llama", ("int4-sym-g16",)), "compressed-tensors", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="it quantizes activations"):
        vlmq.load(tmp_path)


def test_a_missing_tensor_is_an_error(tmp_path):
    """transformers would draw it anew and only log that."""
    write(tmp_path, "gptq")
    tensors = read_tensors(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="the checkpoint lacks tensors of LlamaForCausalLM: model.norm.weight"
    ):
        vlmq.load(tmp_path)
