import pytest
import torch
from torch import nn

from vlmq.eval.size import disk_bytes, model_size, sparsity
from vlmq.formats import QuantizedWeight, get_format
from vlmq.linear import QuantLinear, true_bits


def packed(in_features: int = 24, out_features: int = 5) -> QuantLinear:
    options = {"has_bias": True, "dtype": torch.float32, "device": "cpu"}
    return QuantLinear(in_features, out_features, get_format("int4"), 16, **options)


def test_model_size_counts_codes_scales_zeros_and_the_rest():
    model = nn.Sequential(packed(), nn.Linear(5, 3))
    size = model_size(model)
    assert size.n_quantized_layers == 1
    assert size.n_quantized_weights == 120
    assert size.quantized_bits == 5 * (24 * 4 + 2 * 16 + 2 * 8) == true_bits(model[0])
    assert size.n_parameters == 120 + 5 + 15 + 3
    assert size.total_bits == size.quantized_bits + 32 * (5 + 15 + 3)
    assert size.bits_per_weight == pytest.approx(6.0)
    assert size.coverage == pytest.approx(120 / 143)


def test_model_size_counts_a_tied_parameter_once():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    assert model_size(model).n_parameters == 28


def test_model_size_without_quantized_layers_has_no_bits_per_weight():
    assert str(model_size(nn.Linear(2, 2)).bits_per_weight) == "nan"


def test_sparsity_is_the_share_of_weights_that_are_zero():
    codes = torch.tensor([[0, 1, 2, 1], [1, 1, 1, 1]], dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.ones(2, 1, 1).half(), None, get_format("ternary"), None)
    assert sparsity([QuantLinear.from_quantized(weight)]) == 6 / 8
    zeros = torch.full((2, 1), 64, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.ones(2, 1, 1).half(), zeros, get_format("int2"), None)
    assert sparsity([QuantLinear.from_quantized(weight)]) == 6 / 8
    assert str(sparsity([])) == "nan"


def test_disk_bytes_counts_weight_files_only(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "config.json").write_bytes(b"{}")
    assert disk_bytes(tmp_path) == 5


def test_disk_bytes_of_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no weight file"):
        disk_bytes(tmp_path)
