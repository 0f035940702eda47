"""Packed layers of one input: computed together once that is known, and never with another input's result."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from packed_models import packed
from random_weights import random_weight
from torch import nn

from vlmq.kernels import cpu
from vlmq.linear import QuantLinear, link_siblings

pytestmark = pytest.mark.skipif(cpu.missing_library() is not None, reason="needs the C kernels")
WIDTH = 200


def random_layer(out_features, in_features=WIDTH, name="int4", group_size=64):
    return QuantLinear.from_quantized(random_weight(name, out_features, in_features, group_size))


class Attention(nn.Module):
    def __init__(self, name="int4", second="int4"):
        super().__init__()
        self.q = random_layer(9, name=name)
        self.k = random_layer(5, name=second)
        self.v = random_layer(5, name=name)
        self.o = random_layer(7, in_features=64)
        link_siblings(self)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the backend computed."""
    seen = []
    alone, together = cpu.BoundLayer.__call__, cpu.JoinedLayers.__call__

    def count_one(self, x):
        seen.append(1)
        return alone(self, x)

    def count_many(self, x):
        seen.append(len(self.layers))
        return together(self, x)

    monkeypatch.setattr(cpu.BoundLayer, "__call__", count_one)
    monkeypatch.setattr(cpu.JoinedLayers, "__call__", count_many)
    return seen


def plain(model, x):
    alone = copy.deepcopy(model)
    for module in alone.modules():
        if isinstance(module, QuantLinear):
            module.siblings = None
    return alone(x)


def test_layers_of_one_input_share_it():
    model = Attention()
    assert model.q.siblings is model.k.siblings is model.v.siblings is not None
    assert model.o.siblings is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_tokens", [1, 3, cpu.MAX_TOKENS])
def test_three_layers_take_one_call_once_their_order_is_known(calls, dtype, n_tokens):
    model, inputs = Attention(), [torch.randn(1, n_tokens, WIDTH, dtype=dtype) for _ in range(4)]
    expected = [plain(model, x) for x in inputs]
    calls.clear()
    assert all(torch.equal(model(x), y) for x, y in zip(inputs, expected, strict=True))
    assert calls == [1, 1, 1, 3, 3, 3]


def test_many_tokens_do_not_end_the_sharing(calls):
    model, x, one = Attention(), torch.randn(1, cpu.MAX_TOKENS + 1, WIDTH), torch.randn(1, 1, WIDTH)
    expected = plain(model, x)
    for _ in range(3):
        assert torch.equal(model(x), expected)
    calls.clear()
    assert torch.equal(model(one), plain(model, one))
    assert calls[0] == 3


def test_an_input_changed_in_place_is_computed_anew():
    model, x = Attention(), torch.randn(1, 1, WIDTH)
    for _ in range(3):
        model(x)
    model.q(x)
    x.mul_(2)
    assert torch.equal(model.k(x), plain(model.k, x))


def test_new_weights_are_used_at_once():
    model, x = Attention(), torch.randn(1, 1, WIDTH)
    for _ in range(3):
        model(x)
    other = random_layer(5)
    model.q(x)
    model.k.load_state_dict(other.state_dict())
    assert torch.equal(model.k(x), other(x))


def test_a_layer_that_does_not_come_ends_the_sharing(calls):
    model = Attention()
    for _ in range(3):
        model(torch.randn(1, 1, WIDTH))
    calls.clear()
    for _ in range(3):
        model.q(torch.randn(1, 1, WIDTH))
    assert calls == [3, 1, 1]
    x = torch.randn(1, 1, WIDTH)
    assert torch.equal(model(x), plain(model, x))


def test_layers_of_different_formats_are_computed_alone(calls):
    model, x = Attention(second="ternary"), torch.randn(1, 1, WIDTH)
    expected = plain(model, x)
    calls.clear()
    for _ in range(4):
        assert torch.equal(model(x), expected)
        x = x.clone()
    assert 3 not in calls


def test_the_same_layer_twice_with_one_input(calls):
    model, x = Attention(), torch.randn(1, 1, WIDTH)
    assert all(torch.equal(model.q(x), plain(model.q, x)) for _ in range(4))
    assert 3 not in calls


def test_gradients_go_through_the_operator():
    model = Attention()
    for _ in range(3):
        model(torch.randn(1, 1, WIDTH))
    x = torch.randn(1, 1, WIDTH, requires_grad=True)
    model(x).sum().backward()
    expected = sum(layer.dequantize().sum(0) for layer in (model.q, model.k, model.v))
    torch.testing.assert_close(x.grad[0, 0], expected)


def test_copies_know_nothing_and_share_among_themselves():
    model, x = Attention(), torch.randn(1, 1, WIDTH)
    expected = plain(model, x)
    for _ in range(3):
        model(x)
    model.q(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q.siblings is other.v.siblings
        assert other.q.siblings is not model.q.siblings
        assert all(torch.equal(other(x), expected) for _ in range(3))


def test_threads_do_not_get_each_others_results():
    model = Attention()
    inputs = [torch.randn(1, 1, WIDTH) for _ in range(300)]
    alone = copy.deepcopy(model)
    for module in (alone.q, alone.k, alone.v):
        module.siblings = None
    expected = [alone(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model, inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_model_in_transformers_shares_after_a_load(tmp_path, calls):
    model = packed("llama", ("int4-g32",))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 8)[None]
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        calls.clear()
        assert torch.equal(loaded.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert {2, 3} <= set(calls)
