"""The operator as torch sees it: schema, shapes, gradients, compilation, backends."""

import pytest
import torch
from random_weights import random_weight

from vlmq.formats import FORMATS
from vlmq.kernels.packing import pack


def arguments(name, x, *, with_bias=True, group_size=64, out_features=9, device="cpu"):
    weight = random_weight(name, out_features, x.shape[-1], group_size, device=device)
    bias = torch.randn(out_features, device=device, dtype=x.dtype) if with_bias else None
    tensors = (pack(weight.codes, weight.format.bits), weight.scales, weight.zeros)
    return weight, (x, *tensors, bias, name, x.shape[-1], group_size or 0)


@pytest.mark.parametrize("name", ["int4", "int4-sym"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_quant_linear_passes_opcheck(name, needs_grad, device):
    x = torch.randn(2, 3, 72, device=device, requires_grad=needs_grad)
    _, args = arguments(name, x, device=device)
    torch.library.opcheck(torch.ops.vlmq.quant_linear.default, args)


def test_quant_linear_grad_passes_opcheck():
    _, (_, qweight, scales, zeros, _, *sizes) = arguments("int2", torch.randn(2, 72))
    args = (torch.randn(4, 9), qweight, scales, zeros, *sizes)
    torch.library.opcheck(torch.ops.vlmq.quant_linear_grad.default, args)


@pytest.mark.parametrize(("name", "with_bias"), [("int4", True), ("ternary", False)])
@pytest.mark.parametrize("lead", [(), (2, 3), (0,)])
def test_several_layers_pass_opcheck_and_follow_one_another(name, with_bias, lead, device):
    x = torch.randn(*lead, 72, device=device)
    layers = [arguments(name, x, with_bias=with_bias, out_features=n, device=device)[1][1:5] for n in (9, 5)]
    parts = [[tensor for tensor in part if tensor is not None] for part in zip(*layers, strict=True)]
    sizes = (name, 72, 64)
    torch.library.opcheck(torch.ops.vlmq.quant_linears.default, (x, *parts, *sizes))
    y = torch.ops.vlmq.quant_linears(x, *parts, *sizes)
    alone = [torch.ops.vlmq.quant_linear(x, *layer, *sizes) for layer in layers]
    assert torch.equal(y, torch.cat([one.flatten() for one in alone]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_gradient_is_that_of_a_dense_layer(name, lead):
    x = torch.randn(*lead, 72, dtype=torch.float64, requires_grad=True)
    weight, args = arguments(name, x)
    bias = args[4].requires_grad_()
    y = torch.ops.vlmq.quant_linear(*args)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), grad)
    dense = torch.nn.functional.linear(x, weight.dequantize().double(), bias)
    expected = torch.autograd.grad(dense, (x, bias), grad)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1])


def test_scales_that_require_grad_are_refused():
    _, (x, qweight, scales, *rest) = arguments("int4", torch.randn(2, 72))
    with pytest.raises(RuntimeError, match=r"no gradient for its scales"):
        torch.ops.vlmq.quant_linear(x, qweight, scales.requires_grad_(), *rest)


def test_shape_is_known_on_meta_tensors():
    _, args = arguments("int4", torch.randn(2, 3, 72, dtype=torch.bfloat16))
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    y = torch.ops.vlmq.quant_linear(*meta)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 9), torch.bfloat16, "meta")


def test_compiles_into_one_graph_with_dynamic_shapes():
    _, args = arguments("int4", torch.randn(2, 72))
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(
        lambda x: torch.ops.vlmq.quant_linear(x, *args[1:]).relu(),
        fullgraph=True,
        dynamic=True,
        backend=count,
    )
    for n_tokens in (5, 6, 8):
        x = torch.randn(n_tokens, 72)
        assert torch.equal(compiled(x), torch.ops.vlmq.quant_linear(x, *args[1:]).relu())
    assert len(graphs) == 1


def test_compiled_gradient_equals_the_eager_one():
    x = torch.randn(2, 72, requires_grad=True)
    _, args = arguments("ternary", x)
    eager = torch.autograd.grad(torch.ops.vlmq.quant_linear(*args).square().sum(), x)[0]
    compiled = torch.compile(
        lambda x: torch.ops.vlmq.quant_linear(x, *args[1:]).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], eager)
