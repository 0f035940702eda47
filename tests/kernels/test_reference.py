"""The reference: its weights are the stored ones, its products are right, its memory is bounded."""

import pytest
import torch
from random_weights import random_weight

from vlmq.formats import FORMATS
from vlmq.kernels import reference
from vlmq.kernels.packing import pack

SHAPES = [(5, 1, None), (7, 15, 16), (9, 200, 64), (3, 129, 128), (6, 96, 32), (4, 260, None)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def packed(weight):
    """The arguments that stand for the weight, around the bias."""
    tensors = (pack(weight.codes, weight.format.bits), weight.scales, weight.zeros)
    return tensors, (weight.format.name, weight.codes.shape[1], weight.group_size or 0)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_the_stored_weight(name, shape, device):
    weight = random_weight(name, *shape, device=device)
    tensors, sizes = packed(weight)
    assert torch.equal(reference.dequantize(*tensors, *sizes), weight.dequantize())
    half = reference.dequantize(*tensors, *sizes, torch.bfloat16)
    assert torch.equal(half, weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize("n_rows", [1, 2, 3, 9])
def test_dequantize_does_not_depend_on_the_chunks(n_rows, monkeypatch):
    weight = random_weight("int3", 9, 200, 64)
    tensors, sizes = packed(weight)
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", n_rows * 200)
    assert torch.equal(reference.dequantize(*tensors, *sizes), weight.dequantize())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_quant_linear_multiplies_by_the_weight(dtype, lead, chunk_rows, device, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", chunk_rows * 200)
    weight = random_weight("int4", 9, 200, 64, device=device)
    tensors, sizes = packed(weight)
    x = torch.randn(*lead, 200, device=device).to(dtype)
    bias = torch.randn(9, device=device)
    y = reference.quant_linear(x, *tensors, bias, *sizes)
    assert y.dtype == dtype
    assert y.shape == (*lead, 9)
    expected = x.double() @ weight.dequantize().double().T + bias.double()
    assert y.numel() == 0 or relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_quant_linear_grad_multiplies_by_the_transpose(dtype, device, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", 400)
    weight = random_weight("binary2", 9, 200, 64, device=device)
    tensors, sizes = packed(weight)
    grad = torch.randn(2, 3, 9, device=device).to(dtype)
    got = reference.quant_linear_grad(grad, *tensors, *sizes)
    assert got.dtype == dtype
    assert relative_error(got, grad.double() @ weight.dequantize().double()) < TOLERANCE[dtype]


def test_quant_linear_rounds_like_a_dense_layer():
    weight = random_weight("int4", 9, 200, 64)
    tensors, sizes = packed(weight)
    x = torch.randn(3, 200, dtype=torch.bfloat16)
    dense = torch.nn.functional.linear(x, weight.dequantize(torch.bfloat16))
    assert torch.equal(reference.quant_linear(x, *tensors, None, *sizes), dense)


def test_quant_linear_keeps_its_dtype_under_autocast():
    weight = random_weight("int4", 9, 200, 64)
    tensors, sizes = packed(weight)
    x = torch.randn(3, 200)
    plain = reference.quant_linear(x, *tensors, None, *sizes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.quant_linear(x, *tensors, None, *sizes), plain)


def peak_bytes(function) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        function()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("name", "n_terms"), [("int4", 1), ("int3", 1), ("binary", 1), ("ternary2", 2)])
@pytest.mark.parametrize("in_features", [1000, 1024])
def test_memory_is_bounded_by_the_chunk(name, n_terms, in_features, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", 2**15)
    weight = random_weight(name, 200, in_features, 32)
    tensors, sizes = packed(weight)
    x, grad = torch.randn(1, in_features), torch.randn(1, 200)
    bound = 2**15 * (10 + 12 * (n_terms - 1))
    forward = peak_bytes(lambda: reference.quant_linear(x, *tensors, None, *sizes))
    backward = peak_bytes(lambda: reference.quant_linear_grad(grad, *tensors, *sizes))
    assert 2**15 * 4 < forward < bound + 4 * 200
    assert backward < bound + 4 * in_features
