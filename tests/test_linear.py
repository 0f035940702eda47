"""QuantLinear as a module: built, moved, cast, copied, saved, loaded, and read by model code."""

import copy
import pickle
import weakref

import pytest
import torch
from random_weights import random_weight
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import initialization

from vlmq import linear
from vlmq.formats import FORMATS, get_format
from vlmq.kernels.cpu import MAX_TOKENS, missing_library
from vlmq.linear import QuantLinear, true_bits

SHAPES = [(7, 200, 64), (5, 15, 16), (6, 129, None)]


def random_layer(
    name="int4", out_features=7, in_features=200, group_size=64, *, bias=True, dtype=torch.float32
):
    weight = random_weight(name, out_features, in_features, group_size)
    return QuantLinear.from_quantized(
        weight, torch.randn(out_features, dtype=dtype) if bias else None, dtype=dtype
    )


def stored(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_tensors(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype, name
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_from_quantized_keeps_the_weight(name, shape):
    weight = random_weight(name, *shape)
    layer = QuantLinear.from_quantized(weight)
    back = layer.quantized_weight()
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert (back.zeros is None) == (weight.zeros is None)
    assert back.zeros is None or torch.equal(back.zeros, weight.zeros)
    assert (back.format, back.group_size) == (weight.format, weight.group_size)
    assert torch.equal(layer.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_equals_a_dense_layer_of_the_same_weight(dtype, device):
    layer = random_layer(dtype=dtype).to(device)
    x = torch.randn(2, MAX_TOKENS, 200, dtype=dtype, device=device)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantize(dtype), layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_of_few_tokens_differs_by_what_8_bits_round_away(dtype):
    layer = random_layer(dtype=dtype)
    x = torch.randn(2, 3, 200, dtype=dtype)
    dense = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    assert (layer(x) - dense).norm() < 0.01 * dense.norm()


def test_forward_follows_its_tensors():
    layer, other = random_layer(), random_layer()
    x = torch.randn(3, 200)
    before = layer(x)
    layer.qweight.data = other.qweight.data
    layer.scales = other.scales
    layer.load_state_dict(other.state_dict())
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), other(x))


def test_layer_keeps_no_tensor_that_was_taken_away():
    layer = random_layer()
    layer(torch.randn(3, 200))
    gone = weakref.ref(layer.qweight)
    layer.qweight = nn.Parameter(layer.qweight.to("meta"), requires_grad=False)
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_layer_that_has_run_can_be_copied(copied):
    layer = random_layer()
    x = torch.randn(3, 200)
    before = layer(x)
    assert torch.equal(copied(layer)(x), before)
    assert torch.equal(layer(x), before)


@pytest.mark.skipif(missing_library() is not None, reason="no C library")
def test_layer_without_gradients_skips_the_operator(monkeypatch):
    layer = random_layer()
    monkeypatch.setattr(linear, "quant_linear", None)
    with torch.no_grad():
        assert layer(torch.randn(3, 200, requires_grad=True)).shape == (3, 7)


def test_layer_under_a_transform_goes_through_the_operator():
    layer = random_layer()
    x = torch.randn(3, 200)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = layer(mode.from_tensor(x))
    assert isinstance(y, FakeTensor)
    assert y.shape == (3, 7)


def test_gradient_reaches_the_input_only():
    layer = random_layer()
    x = torch.randn(3, 200, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1))
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("name", ["int4", "int4-sym"])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_holds_packed_tensors_only(name, bias):
    state = random_layer(name, bias=bias).state_dict()
    expected = {"qweight": torch.uint8, "scales": torch.float16}
    expected |= {"zeros": torch.uint8} if name == "int4" else {}
    expected |= {"bias": torch.float32} if bias else {}
    assert {key: tensor.dtype for key, tensor in state.items()} == expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip_is_exact(name, assign):
    layer = random_layer(name)
    device = "meta" if assign else "cpu"
    empty = QuantLinear(200, 7, layer.format, 64, has_bias=True, device=device)
    empty.load_state_dict(stored(layer), assign=assign)
    assert_same_tensors(empty.state_dict(), layer.state_dict())
    assert not any(p.requires_grad for p in empty.parameters())
    x = torch.randn(2, 200)
    assert torch.equal(empty(x), layer(x))


def test_empty_layer_on_meta_has_the_shapes_of_a_full_one():
    with torch.device("meta"):
        empty = QuantLinear(200, 7, get_format("int3"), None, has_bias=True, dtype=torch.bfloat16)
    full = random_layer("int3", group_size=None, dtype=torch.bfloat16)
    assert all(p.is_meta for p in empty.parameters())
    for (name, meta), (other, real) in zip(empty.named_parameters(), full.named_parameters(), strict=True):
        assert (name, meta.shape, meta.dtype, meta.requires_grad) == (other, real.shape, real.dtype, False)
    assert empty(torch.empty(2, 200, device="meta", dtype=torch.bfloat16)).shape == (2, 7)
    assert (empty.weight.shape, empty.weight.dtype) == ((7, 200), torch.bfloat16)
    assert true_bits(empty) == true_bits(full)
    assert empty.to_empty(device="cpu").scales.device.type == "cpu"


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    ],
)
def test_cast_changes_bias_and_weight_but_no_packed_tensor(cast):
    layer = random_layer()
    before = stored(layer)
    cast(layer)
    assert layer.bias.dtype == layer.dtype == layer.weight.dtype == torch.bfloat16
    after = stored(layer)
    del before["bias"], after["bias"]
    assert_same_tensors(after, before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_equal(clone):
    layer = random_layer(dtype=torch.bfloat16)
    twin = clone(layer)
    assert_same_tensors(twin.state_dict(), layer.state_dict())
    assert (twin.format, twin.group_size, twin.dtype) == (layer.format, layer.group_size, layer.dtype)
    twin.scales.data.zero_()
    assert bool(layer.scales.any())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("int4", (7, 200, 64), 7 * (200 * 4 + 4 * 16 + 4 * 8)),
        ("int4-sym", (7, 200, 64), 7 * (200 * 4 + 4 * 16)),
        ("ternary2", (7, 256, None), 7 * (256 * 4 + 2 * 16)),
        # 15 codes: one lane of 2 bits each and one lane of 1 bit each.
        ("int3", (5, 15, 16), 5 * (32 + 16 + 16 + 8)),
        ("binary", (5, 129, 128), 5 * (128 + 16 + 2 * 16 + 2 * 8)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_true_bits_count_all_but_the_bias(name, shape, expected, bias):
    assert true_bits(random_layer(name, *shape, bias=bias)) == expected


def test_true_bits_are_those_of_the_state_dict():
    layer = random_layer("int3", 6, 129, 16, bias=False)
    assert true_bits(layer) == 8 * sum(t.numel() * t.element_size() for t in layer.state_dict().values())


def test_repr_tells_scheme_and_true_bits():
    text = repr(random_layer("int4", 7, 256, 128))
    assert text == (
        "QuantLinear(in_features=256, out_features=7, bias=True, scheme=int4-g128, true_bits_per_weight=4.188)"
    )


def test_weight_is_what_a_reader_expects():
    layer = random_layer(dtype=torch.bfloat16)
    assert torch.equal(layer.weight, layer.dequantize(torch.bfloat16))
    assert layer.weight.device == layer.qweight.device
    assert "weight" not in layer.state_dict()
    assert "weight" not in dict(layer.named_parameters())
    assert sum(p.numel() for p in layer.parameters()) < 7 * 200


@pytest.mark.parametrize(
    "init", [nn.init.xavier_uniform_, nn.init.normal_, initialization.normal_, initialization.zeros_]
)
def test_init_of_the_weight_changes_nothing(init):
    layer = random_layer()
    before = stored(layer)
    init(layer.weight)
    assert_same_tensors(stored(layer), before)


def test_init_by_transformers_draws_no_random_numbers():
    layer = random_layer()
    state = torch.get_rng_state()
    initialization.xavier_uniform_(layer.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiles_inside_a_model():
    model = nn.Sequential(random_layer(), nn.ReLU(), random_layer("ternary", 5, 7, None, bias=False))
    x = torch.randn(3, 200)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "qweight",
            torch.zeros(7, 99, dtype=torch.uint8),
            r"0.qweight must be \(7, 100\) torch.uint8, got \(7, 99\)",
        ),
        (
            "qweight",
            torch.zeros(7, 100, dtype=torch.int32),
            r"0.qweight must be .*, got \(7, 100\) torch.int32",
        ),
        ("scales", torch.zeros(7, 4, 1), r"0.scales must be \(7, 4, 1\) torch.float16, got .* torch.float32"),
        (
            "zeros",
            torch.zeros(7, 1, dtype=torch.uint8),
            r"0.zeros must be \(7, 4\) torch.uint8, got \(7, 1\)",
        ),
        ("bias", torch.zeros(1), r"0.bias must be \(7,\) torch.float32, got \(1,\)"),
    ],
)
def test_load_refuses_a_tensor_that_does_not_fit(name, tensor, message):
    model = nn.Sequential(random_layer())
    state = model.state_dict() | {f"0.{name}": tensor}
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)


def test_load_refuses_a_code_beyond_the_levels():
    layer = random_layer("ternary")
    state = stored(layer)
    state["qweight"][3, 5] = 0b00001100
    with pytest.raises(ValueError, match=r"qweight of format ternary must hold codes below 3, got 3"):
        layer.load_state_dict(state)


def test_load_reports_missing_and_unknown_tensors():
    layer = random_layer()
    state = stored(layer)
    del state["scales"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "scales"'):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "zeros"'):
        random_layer("int4-sym").load_state_dict(stored(layer) | {})


def test_load_casts_a_bias_to_the_dtype_of_the_layer():
    layer = random_layer(dtype=torch.bfloat16)
    state = stored(layer) | {"bias": torch.ones(7)}
    layer.load_state_dict(state)
    assert torch.equal(layer.bias, torch.ones(7, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, "int4", 64), "in_features and out_features must be at least 1, got 0 and 4"),
        ((4, 0, "int4", 64), "got 4 and 0"),
        ((4, 4, "int4", 48), r"group size 48 is not offered; offered: \(16, 32, 64, 128, None\)"),
    ],
)
def test_constructor_refuses(arguments, message):
    in_features, out_features, name, group_size = arguments
    with pytest.raises(ValueError, match=message):
        QuantLinear(in_features, out_features, get_format(name), group_size)


def test_constructor_refuses_a_dtype_that_is_not_floating():
    with pytest.raises(ValueError, match="must be floating, got torch.int8"):
        QuantLinear(4, 4, get_format("int4"), 64, dtype=torch.int8)


def test_from_quantized_refuses_a_code_beyond_the_levels():
    weight = random_weight("ternary2", 3, 20, 16)
    weight.codes[1, 2] = 9
    with pytest.raises(ValueError, match="codes of format ternary2 must hold codes below 9, got 9"):
        QuantLinear.from_quantized(weight)


def test_from_quantized_refuses_a_bias_of_another_layer():
    with pytest.raises(ValueError, match=r"bias must be \(3,\), got \(4,\)"):
        QuantLinear.from_quantized(random_weight("int4", 3, 20, 16), torch.zeros(4))


@pytest.mark.parametrize(
    ("bias", "dtype", "expected"),
    [
        (None, None, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        (torch.zeros(3, dtype=torch.float16), None, torch.float16),
        (torch.zeros(3), torch.bfloat16, torch.bfloat16),
    ],
)
def test_from_quantized_takes_its_dtype_from_the_argument_or_the_bias(bias, dtype, expected):
    layer = QuantLinear.from_quantized(random_weight("int4", 3, 20, 16), bias, dtype=dtype)
    assert layer.dtype == layer.weight.dtype == expected
    assert layer.bias is None or layer.bias.dtype == expected
