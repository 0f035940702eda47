"""Layers that are computed in one launch: the numbers of each alone, in a run and in a compiled graph."""

import copy
import pickle

import pytest
import torch
from random_weights import random_weight
from tiny_models import build
from torch import nn

from vlmq import joint
from vlmq.kernels import triton_config
from vlmq.kernels.backends import OVERRIDE
from vlmq.linear import QuantLinear, link_siblings

WIDTH = 72


def random_layer(out_features, scheme="int4", in_features=WIDTH, has_bias=True):
    weight = random_weight(scheme, out_features, in_features, 32)
    return QuantLinear.from_quantized(weight, torch.randn(out_features) if has_bias else None)


class Attention(nn.Module):
    def __init__(self, **changed):
        super().__init__()
        self.q = random_layer(9, **changed)
        self.k = random_layer(5)
        self.v = random_layer(5)
        self.o = random_layer(7, in_features=9)
        link_siblings(self)

    def forward(self, x):
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        return torch.cat([self.o(q), k, v], -1)


@pytest.fixture(autouse=True)
def _no_bound_layers(monkeypatch):
    """The reference is called as a GPU's kernels are: the CPU's would share by `siblings`."""
    monkeypatch.setenv(OVERRIDE, "reference")


@pytest.fixture
def launches(monkeypatch):
    """How many layers each launch computed."""
    seen = []
    run = joint.quant_linears

    def count(x, qweights, *args):
        seen.append(len(qweights))
        return run(x, qweights, *args)

    monkeypatch.setattr(joint, "quant_linears", count)
    return seen


def alone(model, x):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.joint = None
    return model(x)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_launch_gives_what_each_layer_gives(launches, lead, dtype, mode):
    model = Attention().to(dtype)
    with mode():
        for _ in range(2):
            x = torch.randn(*lead, WIDTH, dtype=dtype)
            assert torch.equal(model(x), alone(model, x))
    assert launches == [3, 3]
    assert model.q.joint._waiting is None


@pytest.mark.parametrize("changed", [{"scheme": "int2"}, {"has_bias": False}])
def test_layers_of_another_kind_are_launched_alone(launches, changed):
    model, x = Attention(**changed), torch.randn(WIDTH)
    assert torch.equal(model(x), alone(model, x))
    assert launches == [2]
    assert model.q.joint is model.o.joint is None


def test_as_many_tokens_are_launched_together_as_one_kernel_takes():
    assert joint.MAX_TOKENS == triton_config.MAX_FUSED_TOKENS


def test_more_tokens_than_pay_are_launched_layer_by_layer(launches):
    model, x = Attention(), torch.randn(joint.MAX_TOKENS + 1, WIDTH)
    assert torch.equal(model(x), alone(model, x))
    assert launches == []


@pytest.mark.parametrize("of", ["x", "bias"])
def test_a_gradient_passes_as_through_each_layer(launches, of):
    model, x = Attention(), torch.randn(3, WIDTH)
    leaf = (x if of == "x" else model.k.bias).requires_grad_()
    grad = torch.autograd.grad(model(x).square().sum(), leaf)[0]
    for module in (model.q, model.k, model.v):
        module.joint = None
    assert torch.equal(grad, torch.autograd.grad(model(x).square().sum(), leaf)[0])
    assert launches == []


@pytest.mark.parametrize("name", ["q", "k"])
def test_scales_that_require_a_gradient_are_refused_as_by_one_layer(launches, name):
    model = Attention()
    getattr(model, name).scales.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient for its scales"):
        model(torch.randn(3, WIDTH))
    assert launches == []


def test_an_input_changed_in_place_is_computed_anew():
    model, x = Attention(), torch.randn(WIDTH)
    model.q(x)
    x.mul_(2)
    assert torch.equal(model.k(x), alone(model.k, x))


def test_another_tensor_of_the_same_values_is_computed_anew(launches):
    model, x = Attention(), torch.randn(WIDTH)
    model.q(x)
    model.v(x.clone())
    assert launches == [3]
    assert torch.equal(model.k(x), alone(model.k, x))


def test_a_result_is_handed_out_once():
    model, x = Attention(), torch.randn(WIDTH)
    model.q(x)
    first = model.k(x)
    kept = first.clone()
    first.zero_()
    assert torch.equal(model.k(x), kept)


def test_new_weights_are_used_at_once():
    model, x, other = Attention(), torch.randn(WIDTH), random_layer(5)
    model.q(x)
    model.k.load_state_dict(other.state_dict())
    assert torch.equal(model.k(x), other(x))


def test_layers_that_never_come_end_the_joint_launch(launches):
    model = Attention()
    for _ in range(joint.MAX_MISSED + 2):
        model.q(torch.randn(WIDTH))
    assert launches == [3] * joint.MAX_MISSED
    x = torch.randn(WIDTH)
    assert torch.equal(model(x), alone(model, x))


def test_one_that_was_stopped_does_not(launches):
    model, x = Attention(), torch.randn(WIDTH)
    for _ in range(2 * joint.MAX_MISSED):
        model.q(torch.randn(WIDTH))
        model(x)
    assert set(launches) == {3}


def test_layers_that_are_elsewhere_yet_are_left_alone(launches):
    model, x = Attention(), torch.randn(WIDTH)
    expected = alone(model.q, x)
    model.k.to("meta")
    assert torch.equal(model.q(x), expected)
    assert launches == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_computes_with_its_own_layers(launches, copied):
    model, x = Attention(), torch.randn(WIDTH)
    model.q(x)
    twin = copied(model)
    assert twin.q.joint is twin.k.joint
    assert twin.q.joint.layers == (twin.q, twin.k, twin.v)
    assert twin.q.joint._waiting is None
    twin.v.bias.data.zero_()
    assert torch.equal(twin(x), alone(twin, x))


def pack_blocks(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features % 16 == 0 and name != "lm_head":
                weight = random_weight("int4", child.out_features, child.in_features, 16)
                bias = None if child.bias is None else child.bias.detach()
                setattr(module, name, QuantLinear.from_quantized(weight, bias, dtype=model.dtype))
    link_siblings(model)
    return model.eval()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_compiled_model_launches_them_together(monkeypatch, backend, mode):
    monkeypatch.setenv(OVERRIDE, backend)
    model = pack_blocks(build("qwen2_5_vl", torch.float32)).model.language_model
    ids = torch.randint(1, 50, (1, 4))
    graphs = []

    def keep(module, example_inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    def run(ids):
        return model(input_ids=ids, use_cache=False).last_hidden_state

    with mode():
        expected = run(ids)
        compiled = torch.compile(run, fullgraph=True, backend=keep)
        for _ in range(2):
            assert torch.equal(compiled(ids), expected)
    (graph,) = graphs
    n_layers = len(model.layers)
    assert sum("quant_linears" in target for target in graph) == 2 * n_layers
    assert sum("quant_linear." in target for target in graph) == 2 * n_layers


def test_export_keeps_the_layers_apart():
    model, x = Attention().eval(), torch.randn(3, WIDTH)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        targets = [str(node.target) for node in program.graph.nodes]
        assert sum("quant_linear." in target for target in targets) == 4
        assert torch.equal(program.module()(x), model(x))
