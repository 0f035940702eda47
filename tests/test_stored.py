"""Ternary codes on disk: fewer bits, the same model in memory, older versions and odd roads as before."""

import pytest
import torch
from packed_models import logits, packed, read_tensors
from safetensors.torch import save_file
from test_checkpoint import set_config, store_as_version_2
from transformers import AutoModelForCausalLM

import vlmq
from vlmq import hf
from vlmq.eval.size import model_size
from vlmq.kernels.trits import from_trits
from vlmq.linear import QuantLinear
from vlmq.stored import disk_bits

TERNARY = ("ternary-g16", "ternary-offset-g32", "ternary2-g32")
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model():
    return packed("llama", TERNARY)


@pytest.fixture
def folder(model, tmp_path):
    return vlmq.save(model, tmp_path / "model")


def test_ternary_codes_are_a_fifth_smaller_on_disk_and_the_same_in_memory(model, folder):
    stored, loaded = read_tensors(folder), vlmq.load(folder)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            codes = stored[f"{name}.qweight"]
            assert codes.shape[1] == -(-layer.qweight.shape[1] * 4 // 5)
            assert torch.equal(from_trits(codes, layer.format.bits, layer.qweight.shape[1]), layer.qweight)
            assert torch.equal(loaded.get_parameter(f"{name}.qweight"), layer.qweight)
            parts = [t for n, t in stored.items() if n.startswith(f"{name}.") and not n.endswith("weight")]
            assert disk_bits(layer) == 8 * (codes.numel() + sum(t.numel() * t.element_size() for t in parts))
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def test_other_formats_are_stored_as_they_lie_in_memory(tmp_path):
    model = packed("llama", ("int2-sym-g16", "binary2-g16", "int4-sym-g32", "binary-g128", "int3-g64"))
    stored = read_tensors(vlmq.save(model, tmp_path / "model"))
    assert all(torch.equal(stored[n], t) for n, t in model.state_dict().items() if n.endswith(".qweight"))
    size = model_size(model)
    assert size.disk_bits == size.quantized_bits


def test_size_tells_memory_and_disk_apart(model):
    size = model_size(model)
    fewer = sum(8 * (m.qweight.numel() // 5) for m in model.modules() if isinstance(m, QuantLinear))
    assert 0 < size.quantized_bits - size.disk_bits <= fewer
    assert size.disk_bits_per_weight < size.bits_per_weight


def test_version_2_still_loads_and_is_saved_as_version_3(model, folder):
    new = read_tensors(folder)
    store_as_version_2(folder, model)
    loaded = vlmq.load(folder)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    vlmq.save(loaded, folder)
    again = read_tensors(folder)
    assert all(torch.equal(again[name], tensor) for name, tensor in new.items())
    assert vlmq.load(folder).config.quantization_config.format_version == 3


def test_version_2_with_trits_is_refused(folder):
    set_config(folder, format_version=2)
    with pytest.raises(
        ValueError, match=r"qweight': expected \(\d+, \d+\) torch.uint8, the checkpoint holds"
    ):
        vlmq.load(folder)


@pytest.mark.parametrize("value", [243, 255])
def test_a_byte_that_holds_no_trits_is_refused_by_name(value, folder):
    tensors = read_tensors(folder)
    tensors[f"{DOWN}.qweight"][3, 1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{DOWN}.qweight' holds code \d+, ternary\S* has codes 0 to"):
        vlmq.load(folder)


def test_codes_that_a_conversion_of_the_family_has_taken_are_unpacked_after_it(model, folder, monkeypatch):
    monkeypatch.setattr(hf, "conversion", lambda: hf.WeightConverter(["no such"], ["tensor"], [object()]))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
