"""Many tokens in the C kernels, on each instruction set that has a kernel for them, against float64."""

import pytest
import torch
from cpu_cases import (
    ISAS,
    bound_layer,
    is_rounding,
    multiply,
    needs_library,
    random_layer,
    relative_error,
    rounded,
    takes_prompts,
)
from random_weights import random_weight

from vlmq.formats import FORMATS, GROUP_SIZES, QuantizedWeight, get_format
from vlmq.kernels import cpu
from vlmq.linear import QuantLinear

pytestmark = needs_library

# Whole blocks and a tail of whole fours of lanes or of odd ones; more rows than a tile; more codes than a tile.
SHAPES = [(35, 200), (5, 15), (70, 576), (33, 1100), (1, 1), (31, 720), (2, 504), (5, 192)]
WITH_PROMPTS = [isa for isa in ISAS if takes_prompts(random_layer("int4", 1, 64, 64, isa))]


@pytest.mark.parametrize("isa", WITH_PROMPTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_equals_the_model_of_rounded_activations(name, isa):
    for group_size in GROUP_SIZES:
        for shape in SHAPES:
            weight = random_weight(name, *shape, group_size)
            layer, dense = bound_layer(weight, isa), weight.dequantize().double()
            x = torch.randn(19 if takes_prompts(layer) else 16, shape[1])
            assert is_rounding(multiply(layer, x) - rounded(x) @ dense.T, weight, x), (group_size, shape)


@pytest.mark.parametrize("isa", WITH_PROMPTS)
@pytest.mark.parametrize("name", ["int4", "ternary", "binary2", "int3-sym"])
def test_a_token_of_a_prompt_does_not_depend_on_those_beside_it(name, isa):
    for group_size in (32, None):
        layer = random_layer(name, 37, 400, group_size, isa)
        x = torch.randn(60, 400)
        y = multiply(layer, x)
        for start, end in ((0, 17), (5, 23), (29, 60)):
            assert torch.equal(multiply(layer, x[start:end].contiguous()), y[start:end])


@pytest.mark.parametrize("isa", WITH_PROMPTS)
@pytest.mark.parametrize("shape", [(700, 130), (40, 1100)])
def test_number_of_threads_does_not_change_a_bit_of_a_prompt(shape, isa):
    layer = random_layer("int4", *shape, 64, isa)
    x = torch.randn(130, shape[1])
    y = multiply(layer, x)
    assert all(torch.equal(multiply(layer, x, n_threads), y) for n_threads in (2, 3, 16))


@pytest.mark.parametrize("isa", WITH_PROMPTS)
def test_more_tokens_than_a_worker_holds(isa):
    weight = random_weight("ternary", 9, 140, None)
    layer, x = bound_layer(weight, isa), torch.randn(1999, 140)
    assert is_rounding(multiply(layer, x) - rounded(x) @ weight.dequantize().double().T, weight, x)


@pytest.mark.parametrize("isa", WITH_PROMPTS)
@pytest.mark.parametrize("name", FORMATS)
def test_extreme_codes_of_a_prompt_do_not_overflow(name, isa):
    fmt = get_format(name)
    codes = torch.full((4, 1024 + 100), fmt.n_levels - 1, dtype=torch.uint8)
    scales = torch.full((4, 9, fmt.n_terms), 0.125, dtype=torch.half)
    zeros = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)[:, None].repeat(1, 9) if fmt.has_zero else None
    weight = QuantizedWeight(codes, scales, zeros, fmt, 128)
    layer = bound_layer(weight, isa)
    for value in (3.0, -3.0):
        x = torch.full((20 if takes_prompts(layer) else 16, 1124), value)
        expected = rounded(x) @ weight.dequantize().double().T
        assert relative_error(multiply(layer, x), expected) < 1e-6


@pytest.mark.parametrize("isa", WITH_PROMPTS)
@pytest.mark.parametrize("group_size", [64, None])
def test_an_undefined_activation_of_a_prompt_shows_and_only_in_its_token(group_size, isa):
    layer = random_layer("int4", 9, 300, group_size, isa)
    x = torch.randn(20, 300)
    clean = multiply(layer, x)
    for value, column in ((torch.nan, 5), (torch.inf, 299)):
        x_bad = x.clone()
        x_bad[2, column] = value
        y = multiply(layer, x_bad)
        assert y[2].isnan().all()
        assert torch.equal(y[3:], clean[3:])
        assert torch.equal(y[:2], clean[:2])


@pytest.mark.parametrize("isa", WITH_PROMPTS)
def test_a_special_scale_shows_in_a_prompt(isa):
    weight = random_weight("int4-sym", 6, 300, 64)
    weight.scales[2, 1] = torch.inf
    weight.scales[4, 4] = torch.nan
    y = multiply(bound_layer(weight, isa), torch.randn(18, 300))
    assert y.isfinite().all(0).tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize("isa", WITH_PROMPTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_of_half_precision_are_rounded_where_that_is_asked_for(dtype, isa):
    weight = random_weight("int4", 40, 300, 64)
    layer, plain = bound_layer(weight, isa, rounds_prompts=True), bound_layer(weight, isa)
    x = torch.randn(2, 20, 300).to(dtype)
    y = layer(x)
    assert torch.equal(y.flatten(0, 1), multiply(layer, x.float().flatten(0, 1)).to(dtype))
    exact = x.flatten(0, 1).double() @ weight.dequantize().double().T
    assert relative_error(layer(x.float()).flatten(0, 1), exact) < 3e-6
    assert relative_error(plain(x.float()).flatten(0, 1), exact) < 3e-6
    assert not torch.equal(plain(x), y)


@pytest.mark.parametrize("backend", ["cpu", "cpu-a8"])
def test_the_entry_of_8_bit_activations_rounds_prompts_and_no_other(monkeypatch, backend):
    monkeypatch.setenv("VLMQ_BACKEND", backend)
    weight, x = random_weight("int4", 40, 300, 64), torch.randn(20, 300, dtype=torch.bfloat16)
    layer = QuantLinear.from_quantized(weight, dtype=torch.bfloat16)
    expected = bound_layer(weight, rounds_prompts=backend == "cpu-a8")(x)
    assert torch.equal(layer(x), expected)
    args = (layer.qweight, layer.scales, layer.zeros, None, "int4", 300, 64)
    assert torch.equal(torch.ops.vlmq.quant_linear(x, *args), expected)
    assert layer.kernel().startswith(f"{backend} (")


@pytest.mark.parametrize("isa", WITH_PROMPTS)
def test_prompts_of_joined_layers_equal_those_of_layers_alone(isa):
    layers = [random_layer("ternary", n, 330, 64, isa, rounds_prompts=True) for n in (6, 131, 1)]
    x = torch.randn(cpu.MAX_TOKENS + 5, 330, dtype=torch.bfloat16)
    joined = layers[0].join(layers[1:])
    assert joined is not None
    assert all(torch.equal(y, layer(x)) for y, layer in zip(joined(x), layers, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "binary2"])
def test_each_number_of_tokens_is_computed(name, isa):
    layer = random_layer(name, 3, 70, 64, isa, rounds_prompts=True)
    for n_tokens in (16, 17, 32, 33, 64, 65):
        assert layer(torch.randn(n_tokens, 70, dtype=torch.bfloat16)).isfinite().all()
