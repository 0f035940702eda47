"""The C kernels, on each instruction set that this CPU has, against float64."""

import pytest
import torch
from cpu_cases import ISAS, bound_layer, is_rounding, needs_library, random_layer, relative_error, rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_weight

from vlmq.formats import FORMATS, GROUP_SIZES, QuantizedWeight, get_format
from vlmq.kernels import cpu, reference
from vlmq.kernels.packing import pack

pytestmark = needs_library

N_TOKENS = (1, 2, 3, 8, 16, 17, 64, 257)
SHAPES = [(9, 200), (5, 15), (6, 129), (7, 576), (1, 1)]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_few_tokens_equal_the_model_of_rounded_activations(name, group_size, isa):
    for shape in SHAPES:
        weight = random_weight(name, *shape, group_size)
        layer, dense = bound_layer(weight, isa), weight.dequantize().double()
        for n_tokens in (1, 5):
            x = torch.randn(n_tokens, shape[1])
            exact = rounded(x) @ dense.T
            assert is_rounding(layer(x) - exact, weight, x), (shape, n_tokens)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("n_tokens", N_TOKENS)
def test_every_count_of_tokens_and_dtype(n_tokens, dtype, isa):
    for name, group_size in (("int4", 64), ("ternary", None), ("int3-sym", 32), ("binary2", 128)):
        weight = random_weight(name, 13, 300, group_size)
        bias = torch.randn(13, dtype=dtype)
        x = torch.randn(n_tokens, 300).to(dtype)
        y = bound_layer(weight, isa, bias)(x)
        seen = rounded(x) if n_tokens <= cpu.MAX_TOKENS else x.double()
        expected = seen @ weight.dequantize().double().T + bias.double()
        assert y.dtype == dtype
        assert relative_error(y, expected) < ROUNDING[dtype]


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_of_activations_costs_less_than_a_hundredth(name):
    weight = random_weight(name, 33, 700, 64)
    x = torch.randn(4, 700)
    assert relative_error(bound_layer(weight)(x), x.double() @ weight.dequantize().double().T) < 0.01


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_weight_is_the_reference_bit_by_bit(name, isa, dtype):
    for group_size in (16, 128, None):
        weight = random_weight(name, 11, 333, group_size)
        layer = bound_layer(weight, isa)
        assert torch.equal(layer.unpack(slice(0, 11), dtype), weight.dequantize().to(dtype))
        assert torch.equal(layer.unpack(slice(4, 9), dtype), weight.dequantize()[4:9].to(dtype))


def test_many_tokens_equal_the_reference_bit_by_bit(monkeypatch):
    for chunk in (2**20, 700):
        monkeypatch.setattr(cpu, "CHUNK_WEIGHTS", chunk)
        monkeypatch.setattr(reference, "CHUNK_WEIGHTS", chunk)
        weight, x = random_weight("int3", 9, 200, 64), torch.randn(2, 17, 200)
        args = (pack(weight.codes, 3), weight.scales, weight.zeros, torch.randn(9), "int3", 200, 64)
        assert torch.equal(cpu.quant_linear(x, *args), reference.quant_linear(x, *args))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 700)),
    group_size=st.sampled_from(GROUP_SIZES),
    n_tokens=st.integers(1, cpu.MAX_TOKENS),
)
def test_any_shape(isa, name, shape, group_size, n_tokens):
    weight = random_weight(name, *shape, group_size)
    x = torch.randn(n_tokens, shape[1])
    dense = weight.dequantize().double()
    assert is_rounding(bound_layer(weight, isa)(x) - rounded(x) @ dense.T, weight, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_extreme_codes_and_activations_do_not_overflow(name, isa):
    fmt = get_format(name)
    codes = torch.full((4, 4096 + 100), fmt.n_levels - 1, dtype=torch.uint8)
    scales = torch.full((4, 33, fmt.n_terms), 0.125, dtype=torch.half)
    zeros = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)[:, None].repeat(1, 33) if fmt.has_zero else None
    weight = QuantizedWeight(codes, scales, zeros, fmt, 128)
    for value in (3.0, -3.0):
        x = torch.full((5, 4196), value)
        expected = rounded(x) @ weight.dequantize().double().T
        assert relative_error(bound_layer(weight, isa)(x), expected) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_an_undefined_activation_shows_and_only_in_its_token(isa):
    layer = random_layer("int4", 9, 300, 64, isa)
    x = torch.randn(4, 300)
    clean = layer(x)
    for value in (torch.nan, torch.inf):
        for column in (5, 299):
            x_bad = x.clone()
            x_bad[2, column] = value
            y = layer(x_bad)
            assert y[2].isnan().all()
            assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("isa", ISAS)
def test_zero_and_tiny_activations(isa):
    layer = random_layer("int2", 9, 300, 32, isa)
    assert not layer(torch.zeros(2, 300)).any()
    assert layer(torch.full((2, 300), 1e-42)).isfinite().all()
    x = torch.randn(1, 300)
    torch.testing.assert_close(layer(x * 1e-30) * 1e30, layer(x))


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_does_not_depend_on_those_beside_it(isa):
    for name in ("ternary", "int3", "int8"):
        layer = random_layer(name, 21, 400, 16, isa)
        x = torch.randn(7, 400)
        assert torch.equal(layer(x), torch.cat([layer(x[i : i + 1]) for i in range(7)]))


def test_a_special_scale_shows(monkeypatch):
    weight = random_weight("int4-sym", 6, 300, 64)
    weight.scales[2, 1] = torch.inf
    weight.scales[4, 4] = torch.nan
    for isa in ISAS:
        y = bound_layer(weight, isa)(torch.randn(3, 300))
        assert y.isfinite().all(0).tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize("shape", [(300,), (2, 3, 300), (0, 300), (2, 0, 300)])
def test_leading_dimensions_are_kept(shape):
    layer = random_layer("int4", 9, 300, 64)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 9)
    assert torch.equal(y.reshape(-1, 9), layer(x.reshape(-1, 300)))


def test_strided_activations_are_read_right():
    layer = random_layer("int4", 9, 300, 64)
    x = torch.randn(300, 6)
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


def test_strided_parts_are_read_right():
    weight = random_weight("int4", 9, 300, 64)
    packed = pack(weight.codes, 4)
    strided = packed.T.contiguous().T
    assert not strided.is_contiguous()
    layer = cpu.bind(strided, weight.scales, weight.zeros, None, "int4", 300, 64)
    layer.let_go()
    x = torch.randn(3, 300)
    assert torch.equal(layer(x), bound_layer(weight)(x))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int4", "int3", "ternary", "binary2"])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_layers_computed_together_equal_layers_alone(isa, name, n_tokens):
    layers = [random_layer(name, n, 330, 64, isa) for n in (6, 131, 1, 40)]
    x = torch.randn(2, n_tokens, 330, dtype=torch.bfloat16)
    joined = layers[0].join(layers[1:])
    assert joined is not None
    results = joined(x)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(results, layers, strict=True))


@needs_library
def test_layers_that_do_not_fit_are_not_computed_together():
    layer = random_layer("int4", 6, 330, 64)
    assert layer.join([random_layer("int3", 6, 330, 64)]) is None
    assert layer.join([random_layer("int4", 6, 330, 32)]) is None
    assert layer.join([layer] * cpu.MAX_LAYERS) is None


@needs_library
def test_many_tokens_of_joined_layers_are_computed_alone():
    layers = [random_layer("int4", n, 330, 64) for n in (6, 3)]
    x = torch.randn(cpu.MAX_TOKENS + 1, 330)
    results = layers[0].join(layers[1:])(x)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(results, layers, strict=True))


@needs_library
def test_joined_layers_refuse_a_wrong_shape():
    layer = random_layer("int4", 6, 330, 64)
    with pytest.raises(ValueError, match=r"x must be \(..., 330\)"):
        layer.join([layer])(torch.randn(1, 331))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8", "ternary", "binary2"])
def test_look_up_gives_rows_of_the_weight(name, dtype):
    weight = random_weight(name, 50, 200, 64)
    ids = torch.tensor([[3, 0], [49, 3]])[:, 0]  # not contiguous
    rows = bound_layer(weight).look_up(ids, dtype)
    assert torch.equal(rows, weight.dequantize()[ids].to(dtype))


@needs_library
@pytest.mark.parametrize("wrong", [-1, 50])
def test_look_up_of_a_row_that_does_not_exist_is_refused(wrong):
    with pytest.raises(IndexError, match=r"0 \.\. 49"):
        random_layer("int8", 50, 200, 64).look_up(torch.tensor([0, wrong]), torch.float32)
