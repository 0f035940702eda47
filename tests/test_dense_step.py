"""A dense output head gives what it gave before, few tokens by another road."""

import copy

import pytest
import torch
from packed_models import packed
from torch import nn

from vlmq import dense_step
from vlmq.dense_step import DenseStep, install_dense_step
from vlmq.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.missing_library() is not None, reason="needs the C kernels")


@pytest.fixture
def calls(monkeypatch):
    seen, compute = [], dense_step.dense

    def count(x, *args):
        seen.append(x.shape)
        return compute(x, *args)

    monkeypatch.setattr(dense_step, "dense", count)
    return seen


@pytest.fixture(scope="module")
def model():
    return packed("llama", ("int4-g32",))


def test_few_tokens_go_through_c_and_the_result_is_the_heads(model, calls):
    x = torch.randn(1, 1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        out = model.lm_head(x)
        expected = nn.Linear.forward(model.lm_head, x)
    assert calls == [x.shape]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("x", [torch.randn(1, 5, 64, dtype=torch.bfloat16), torch.randn(1, 1, 64)])
def test_all_else_goes_through_torch(model, calls, x):
    head = copy.deepcopy(model.lm_head).to(x.dtype)
    with torch.no_grad():
        assert torch.equal(head(x), nn.functional.linear(x, head.weight))
    assert calls == []


def test_gradients_and_graphs_go_through_torch(model, calls, monkeypatch):
    x = torch.randn(1, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    model.lm_head(x).sum().backward()
    assert x.grad is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        model.lm_head(x)
    assert calls == []


def test_a_copy_has_its_own_and_it_is_installed_once(model):
    other = copy.deepcopy(model)
    step = other.lm_head.forward
    assert isinstance(step, DenseStep)
    assert step.layer is other.lm_head
    install_dense_step(other)
    assert other.lm_head.forward is step


def test_packed_heads_and_models_without_one_are_left_alone(model):
    other = copy.deepcopy(model)
    other.lm_head = other.model.layers[0].mlp.up_proj
    for module in (other, nn.Sequential(nn.Linear(2, 2))):
        install_dense_step(module)
    assert "forward" not in other.lm_head.__dict__
