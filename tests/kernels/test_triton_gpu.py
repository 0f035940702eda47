"""The Triton kernels on a GPU: assembly, plain form and reference; graphs, compilation, generation."""

import pytest
import torch
from random_weights import random_weight

from vlmq.formats import FORMATS
from vlmq.kernels import reference
from vlmq.kernels.backends import choose_backend
from vlmq.kernels.packing import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def triton_linear():
    pytest.importorskip("triton")
    from vlmq.kernels import triton_linear

    return triton_linear


def arguments(name, shape, group_size):
    weight = random_weight(name, *shape, group_size, device="cuda")
    tensors = (pack(weight.codes, weight.format.bits), weight.scales, weight.zeros)
    return weight, (*tensors, name, shape[1], group_size or 0)


def relative_error(got, expected) -> float:
    assert got.isfinite().all()
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, None])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(300, 1000), (256, 2048)])
def test_assembly_equals_the_plain_form(triton_linear, name, group_size, dtype, shape):
    weight, args = arguments(name, shape, group_size)
    for n_tokens in (1, 17, 64):
        x = torch.randn(n_tokens, shape[1], device="cuda", dtype=dtype)
        with_assembly, plain = (
            triton_linear.fused_linear(x, *args, use_assembly=use) for use in (True, False)
        )
        assert torch.equal(with_assembly, plain)
        assert relative_error(plain, x.double() @ weight.dequantize().double().T) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", [16, 64, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dequantized_weight_is_the_reference(triton_linear, name, group_size, dtype):
    _, args = arguments(name, (300, 1000), group_size)
    assert torch.equal(triton_linear.dequantize(*args, dtype), reference.dequantize(*args, dtype))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 8, 16, 17, 64, 257])
def test_operator_multiplies_by_the_weight(name, dtype, n_tokens):
    weight, args = arguments(name, (300, 1000), 64)
    x = torch.randn(n_tokens, 1000, device="cuda", dtype=dtype)
    bias = torch.randn(300, device="cuda", dtype=dtype)
    assert choose_backend(x, name, 1000, 64).name == "triton"
    y = torch.ops.vlmq.quant_linear(x, *args[:3], bias, *args[3:])
    expected = x.double() @ weight.dequantize().double().T + bias.double()
    assert relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("n_tokens", [1, 16, 300])
@pytest.mark.parametrize(("name", "group_size"), [("int4", 128), ("ternary", None)])
def test_cuda_graph_replays_with_new_inputs(name, group_size, n_tokens):
    _, args = arguments(name, (512, 4096), group_size)
    x = torch.randn(n_tokens, 4096, device="cuda", dtype=torch.bfloat16)
    torch.ops.vlmq.quant_linear(x, *args[:3], None, *args[3:])  # compiles, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.vlmq.quant_linear(x, *args[:3], None, *args[3:])
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, torch.ops.vlmq.quant_linear(x, *args[:3], None, *args[3:]))


@pytest.mark.parametrize("backend", ["triton", "triton-a8"])
@pytest.mark.parametrize("n_tokens", [1, 3, 17, 257])
@pytest.mark.parametrize(("name", "group_size"), [("int4", 128), ("ternary", None), ("int3", 64)])
def test_layers_in_one_launch_equal_those_of_one_each(monkeypatch, name, group_size, n_tokens, backend):
    monkeypatch.setenv("VLMQ_BACKEND", backend)
    x = torch.randn(n_tokens, 1024, device="cuda", dtype=torch.bfloat16)
    layers = [arguments(name, (width, 1024), group_size) for width in (896, 128, 40)]
    biases = [torch.randn(len(args[0]), device="cuda", dtype=torch.bfloat16) for _, args in layers]
    parts = [
        [t for t in part if t is not None] for part in zip(*(args[:3] for _, args in layers), strict=True)
    ]
    y = torch.ops.vlmq.quant_linears(x, *parts, biases, name, 1024, group_size or 0)
    rows = y.split([n_tokens * len(bias) for bias in biases])
    for (weight, _), bias, part in zip(layers, biases, rows, strict=True):
        # Alone it may be split in other places, so that its sums are others too.
        expected = x.double() @ weight.dequantize().double().T + bias.double()
        limit = 5e-2 if backend == "triton-a8" else TOLERANCE[x.dtype]
        assert relative_error(part.view(n_tokens, -1), expected) < limit


@pytest.mark.parametrize("is_compiled", [False, True])
def test_attention_and_mlp_are_captured_with_joint_launches(monkeypatch, is_compiled):
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlmq import joint
    from vlmq.linear import QuantLinear, link_siblings

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    for module in list(model.model.modules()):
        for name, dense in list(module.named_children()):
            if type(dense) is torch.nn.Linear:
                weight = random_weight("int4", dense.out_features, dense.in_features, 64, device="cuda")
                setattr(module, name, QuantLinear.from_quantized(weight, dtype=torch.bfloat16))
    ids = torch.randint(0, 128, (1, 1), device="cuda")
    with torch.inference_mode():
        alone = model(ids, use_cache=False).logits
        link_siblings(model)
        seen, run = [], joint.quant_linears
        if not is_compiled:
            monkeypatch.setattr(joint, "quant_linears", lambda *args: seen.append(len(args[1])) or run(*args))
        step = torch.compile(model, fullgraph=True) if is_compiled else model
        step(ids, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(ids, use_cache=False).logits
        graph.replay()
        assert relative_error(logits, alone.double()) < 2e-2
    assert seen == ([] if is_compiled else [3, 2] * 4)


def test_compiles_into_one_graph():
    _, args = arguments("int4", (512, 1024), 128)
    compiled = torch.compile(
        lambda x: torch.ops.vlmq.quant_linear(x, *args[:3], None, *args[3:]).relu(), fullgraph=True
    )
    for n_tokens in (1, 5):
        x = torch.randn(n_tokens, 1024, device="cuda", dtype=torch.bfloat16)
        eager = torch.ops.vlmq.quant_linear(x, *args[:3], None, *args[3:]).relu()
        assert torch.equal(compiled(x), eager)


def test_generation_with_a_static_cache_equals_eager():
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlmq.linear import QuantLinear

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    for block in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            dense = getattr(block.self_attn, name)
            weight = random_weight("int4", dense.out_features, dense.in_features, 64, device="cuda")
            setattr(block.self_attn, name, QuantLinear.from_quantized(weight, dtype=torch.bfloat16))
    tokens = torch.randint(0, 128, (1, 7), device="cuda")
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(tokens, **options)
    static = model.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(static[:, : plain.shape[1]], plain)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradient_multiplies_by_the_transpose(dtype, monkeypatch, triton_linear):
    monkeypatch.setattr(triton_linear, "WORKSPACE_BYTES", 64 * 1000 * dtype.itemsize)
    weight, args = arguments("int4", (300, 1000), 64)
    grad = torch.randn(5, 300, device="cuda", dtype=dtype)
    got = torch.ops.vlmq.quant_linear_grad(grad, *args)
    assert relative_error(got, grad.double() @ weight.dequantize().double()) < TOLERANCE[dtype]
