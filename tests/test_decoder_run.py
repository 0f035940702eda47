"""Layers computed before their calls give the same bits as layers computed when they are called."""

import copy
import threading

import pytest
import torch
from packed_models import block_linears, pack_layers, packed
from test_decoder_step import IDS, by_own_code, decode, is_same
from tiny_models import TEXT, from_config
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, SmolLM3Config

from vlmq import decoder_run, decoder_step
from vlmq.attach import attach
from vlmq.decoder_run import ModelStep, Run, current_run, install_runs
from vlmq.kernels import cpu
from vlmq.known_code import is_plain_loop

pytestmark = pytest.mark.skipif(cpu.missing_library() is not None, reason="needs the C kernels")
N_LAYERS = 4


def of_four_layers(config=LlamaConfig, dtype=torch.bfloat16, **more):
    model = from_config(
        AutoModelForCausalLM, config(**(TEXT | {"num_hidden_layers": N_LAYERS} | more)), dtype
    )
    chosen = dict.fromkeys(block_linears(model), "int4-g32")
    pack_layers(model, chosen)
    attach(model, chosen, {"seed": 0, "calibration": "none"})
    return model


@pytest.fixture(scope="module")
def shared():
    return of_four_layers()


@pytest.fixture
def model(shared):
    return copy.deepcopy(shared)


@pytest.fixture
def calls(monkeypatch):
    """Number of layers of each call."""
    seen, compute = [], decoder_step.decode

    def count(layers, token):
        seen.append(len(layers))
        return compute(layers, token)

    monkeypatch.setattr(decoder_step, "decode", count)
    return seen


def one_by_one(model):
    """The same model, no layer computed before its call."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module.__dict__.get("forward"), ModelStep):
            del module.forward
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_of_a_token_are_one_call_and_no_bit_is_another(dtype, calls):
    model = of_four_layers(dtype=dtype)
    out = decode(model)
    assert calls == [N_LAYERS, N_LAYERS]  # the first new token makes room in the cache
    calls.clear()
    assert torch.equal(decode(one_by_one(model)), out)
    assert calls == [1] * 2 * N_LAYERS


def test_each_layer_of_the_cache_has_the_token_once(model):
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    decode(model, cache=cache)
    decode(one_by_one(model), cache=other)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert mine.get_seq_length() == IDS.shape[1] + 3
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs).mul_(2)


def wrap(layers):
    layers[2] = Wrapped(layers[2])


def wrap_forward(layers):
    mine = layers[2].forward
    layers[2].forward = lambda x, **kwargs: mine(x * 2, **kwargs)


def call_otherwise(layers):
    class Loud(type(layers[2])):
        def __call__(self, x, **kwargs):
            return super().__call__(x * 2, **kwargs)

    layers[2].__class__ = Loud


def keep_dense(layers):
    up = layers[2].mlp.up_proj
    layers[2].mlp.up_proj = nn.Linear(up.in_features, up.out_features, bias=False, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "lengths"),
    [
        (lambda layers: layers[2].register_forward_hook(lambda m, a, out: out.mul_(2)), [2, 1, 1]),
        (lambda layers: layers[2].register_forward_pre_hook(lambda m, a: (a[0] * 2,)), [2, 1, 1]),
        (lambda layers: layers[0].register_forward_hook(lambda m, a, out: out.mul_(2)), [1, 3]),
        (lambda layers: layers[2].mlp.register_forward_hook(lambda m, a, out: out * 2), [2, 1]),
        (lambda layers: setattr(layers[1].self_attn, "layer_idx", 0), [1, 1, 2]),
        (lambda layers: layers[2].self_attn.train(), [2, 1]),
        (keep_dense, [2, 1]),
        (wrap, [2, 1, 1]),
        (wrap_forward, [2, 1, 1]),
        (call_otherwise, [2, 1, 1]),
    ],
)
def test_a_layer_that_somebody_sees_or_changed_ends_a_call(model, change, lengths, calls):
    decode(model)
    change(model.model.layers)
    calls.clear()
    out = decode(model)
    assert calls[-len(lengths) :] == lengths
    torch.testing.assert_close(out, decode(by_own_code(model)), rtol=2e-2, atol=2e-2)
    assert torch.equal(out, decode(one_by_one(model)))


def test_a_hook_that_comes_and_goes_is_followed(model, calls):
    cache = DynamicCache(config=model.config)
    decode(model, cache=cache)
    hook = model.model.layers[3].register_forward_hook(lambda m, a, out: out * 0)
    calls.clear()
    with torch.no_grad():
        silent = model(IDS[:, :1], past_key_values=cache).logits
        hook.remove()
        model(IDS[:, :1], past_key_values=cache)
    assert silent.abs().sum() == 0
    assert calls == [3, 1, 4]


def test_a_call_that_ends_early_is_not_prepared_for_each_token(model, calls, monkeypatch):
    keep_dense(model.model.layers)
    made, make = [], decoder_step.Stack
    monkeypatch.setattr(decoder_step, "Stack", lambda *args: made.append(args) or make(*args))
    decode(model, n=6)
    assert calls == [2, 1] * 5
    assert len(made) == 2


def test_tensors_of_later_layers_that_move_between_tokens_are_followed(model):
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    theirs = one_by_one(model)
    decode(model, cache=cache)
    decode(theirs, cache=other)
    out = []
    for each, past in ((model, cache), (theirs, other)):
        scales = each.model.layers[3].mlp.down_proj.scales
        scales.data = scales.data * 4
        with torch.no_grad():
            out.append(each(IDS[:, :1], past_key_values=past).logits)
    assert torch.equal(*out)


def test_layers_that_are_skipped_are_not_computed(model, calls):
    model.model.config.num_hidden_layers = 2
    decode(model)
    assert calls == [2, 2]


@pytest.mark.parametrize("change", ["x", "mask", "cache", "positions", "layer"])
def test_a_call_with_something_else_is_computed_anew(model, change, calls):
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    for cache in caches:
        decode(model, cache=cache)
    calls.clear()
    inner, n = model.model, IDS.shape[1] + 3
    given, (x, *_) = [], torch.randn(2, 1, 1, TEXT["hidden_size"], dtype=model.dtype)
    turn = inner.rotary_emb(x, torch.tensor([[n]]))
    token = decoder_run._RUN.set(Run(inner))
    try:
        with torch.no_grad():
            known = {"attention_mask": None, "past_key_values": caches[0], "position_embeddings": turn}
            y = inner.layers[0](x, **known)
            other = {
                "x": {},
                "mask": {"attention_mask": torch.ones(1, 1, 1, n + 1, dtype=torch.bool)},
                "cache": {"past_key_values": caches[1]},
                "positions": {"position_embeddings": tuple(t.clone() for t in turn)},
                "layer": {},
            }[change]
            layer = inner.layers[2 if change == "layer" else 1]
            given.append(layer(y.clone() if change == "x" else y, **(known | other)))
            inner.layers[3](given[0], **known)
    finally:
        decoder_run._RUN.reset(token)
    assert calls == [4, 1, 1]
    with torch.no_grad():
        fresh = DynamicCache(config=model.config)
        decode(model, cache=fresh)
        expected = layer(y, **(known | other | {"past_key_values": fresh}))
    assert torch.equal(given[0], expected)


def test_a_cache_that_some_layers_share_ends_a_call(model, calls):
    cache = DynamicCache(config=model.config)
    decode(model, cache=cache)
    cache.layers[2].update(*[torch.zeros_like(cache.layers[2].keys[:, :, :1])] * 2)
    calls.clear()
    with torch.no_grad():
        model(IDS[:, :1], past_key_values=cache)
    assert calls == [2, 1, 1]  # the third holds a token more


def test_rotation_is_that_of_each_layer(calls):
    model = of_four_layers(SmolLM3Config, no_rope_layers=[1, 0, 1, 0])
    assert is_same(model, {"input_ids": IDS})
    assert set(calls) == {N_LAYERS}
    before = decode(model)
    model.model.layers[1].self_attn.use_rope = 1
    assert not torch.equal(decode(model), before)
    assert torch.equal(decode(model), decode(one_by_one(model)))


def test_tokens_that_are_taken_back_are_forgotten(model):
    ids = IDS.repeat(1, 2)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        expected = by_own_code(model).generate(ids, **options)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), expected)


def test_a_model_whose_code_is_another_computes_layer_by_layer(model, calls):
    class Other(type(model.model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.model.__class__ = Other
    decode(model)
    assert set(calls) == {1}


def test_a_list_of_layers_of_another_kind_computes_layer_by_layer(model, calls):
    class Lazy(nn.ModuleList):
        pass

    model.model.layers = Lazy(model.model.layers)
    decode(model)
    assert set(calls) == {1}


def test_a_run_ends_with_the_forward(model):
    model.model.norm.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        decode(model)
    assert current_run() is None


def test_threads_do_not_meet(model):
    expected, out = decode(model), {}

    def compute(i):
        out[i] = [decode(model) for _ in range(3)]

    threads = [threading.Thread(target=compute, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected) for some in out.values() for one in some)
    assert len(out) == 3


def test_copies_have_a_forward_of_their_own(model):
    other = copy.deepcopy(model)
    assert other.model.forward.model is other.model
    first, mine = model.model.forward, lambda *args, **kwargs: None
    other.model.forward = mine
    for each in (model, other):
        install_runs(each)
    assert model.model.forward is first
    assert other.model.forward is mine


def test_a_graph_is_made_of_the_own_code(model, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(decoder_run, "Run", lambda model: 1 / 0)
    decode(model)


@pytest.mark.parametrize("family", ["llava", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_loops_of_known_families_are_known(family):
    model = packed(family, ("int4-g32",))
    steps = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), ModelStep)]
    assert len(steps) == 1
    assert is_plain_loop(steps[0])
