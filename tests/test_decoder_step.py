"""Decoder layers in one call give what the layers' own code gives, and leave to it what they cannot compute."""

import copy
import io

import pytest
import torch
from packed_models import block_linears, pack_layers, packed
from tiny_models import TEXT, from_config, inputs
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StaticCache,
)

from vlmq import decoder_step
from vlmq.attach import attach
from vlmq.decoder_step import DecoderStep, install_steps
from vlmq.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.missing_library() is not None, reason="needs the C kernels")
IDS = torch.arange(3, 40).reshape(1, -1)
N_NEW = 12


@pytest.fixture
def calls(monkeypatch):
    """Number of sequences of each layer that was computed in C."""
    seen, compute = [], decoder_step.decode

    def count(layers, token):
        seen.extend([len(token.x)] * len(layers))
        return compute(layers, token)

    monkeypatch.setattr(decoder_step, "decode", count)
    return seen


@pytest.fixture(scope="module")
def llama():
    return packed("llama", ("int4-g32", "ternary-g64", "int2-channel"))


def by_own_code(model):
    """The same model, each layer computed by its own code."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module.__dict__.get("forward"), DecoderStep):
            del module.forward
    return other


def generate(model, batch, **kwargs):
    options = {"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        out = model.generate(**batch, return_dict_in_generate=True, output_logits=True, **options | kwargs)
    return out.sequences, torch.stack(out.logits)


def is_same(model, batch, **kwargs):
    tokens, logits = generate(model, batch, **kwargs)
    expected, expected_logits = generate(by_own_code(model), batch, **kwargs)
    torch.testing.assert_close(logits, expected_logits, rtol=2e-2, atol=2e-2)
    return torch.equal(tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generation_is_that_of_the_layers_own_code(dtype, calls):
    model = packed("llama", ("int4-g32", "ternary-g64"), dtype)
    assert is_same(model, {"input_ids": IDS})
    assert calls == [1] * 2 * (N_NEW - 2)  # the first new token makes room in the cache


@pytest.mark.parametrize("family", ["llava", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_language_models_of_known_families_answer_the_same(family, calls):
    model = packed(family, ("int4-g32", "int4-g32", "ternary-g16"))
    assert is_same(model, inputs(family, 1, dtype=model.dtype)[0])
    assert calls


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config])
def test_language_models_of_known_families_generate_the_same(config, calls):
    more = {"no_rope_layers": [1, 0]} if config is SmolLM3Config else {"sliding_window": None}
    model = from_config(AutoModelForCausalLM, config(**(TEXT | more)), torch.bfloat16)
    chosen = dict.fromkeys(block_linears(model), "int4-g32")
    pack_layers(model, chosen)
    attach(model, chosen, {"seed": 0, "calibration": "none"})
    assert is_same(model, {"input_ids": IDS})
    assert len(calls) == 2 * (N_NEW - 2)


def test_a_flag_that_the_code_does_not_ask_for_changes_nothing(llama):
    """`use_rope` counts where the code asks for it, and nowhere else."""
    model = copy.deepcopy(llama)
    model.model.layers[0].self_attn.use_rope = False
    assert torch.equal(decode(model), decode(llama))


def test_hooks_on_all_modules_are_called(llama, calls):
    decode(llama)
    calls.clear()
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None):
        decode(llama)
    assert calls == []


def test_padded_rows_and_several_sequences(llama, calls):
    ids = torch.cat([IDS, IDS.flip(1)])
    ids[1, :9] = 0
    assert is_same(llama, {"input_ids": ids, "attention_mask": (ids != 0).long()})
    assert set(calls) == {2}


def test_beams_are_left_to_the_layers_own_code(llama, calls):
    assert is_same(llama, {"input_ids": IDS}, num_beams=3)
    assert calls == []


def decode(model, *, cache=None, n=3, **kwargs):
    """Logits of n tokens after a prompt."""
    cache = cache or DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        for i in range(n):
            out = model(IDS[:, i : i + 1], past_key_values=cache, **kwargs)
    return out.logits


def test_weights_that_move_are_followed(llama, calls):
    model = copy.deepcopy(llama)
    decode(model)
    assert len(calls) == 4
    model.model.layers[0].mlp.up_proj.scales.data = model.model.layers[0].mlp.up_proj.scales * 2
    model.model.layers[0].input_layernorm.weight.data = model.model.layers[0].input_layernorm.weight * 2
    torch.testing.assert_close(decode(model), decode(by_own_code(model)), rtol=2e-2, atol=2e-2)
    nn.Module.float(model)  # transformers' own refuses to
    torch.testing.assert_close(decode(model), decode(by_own_code(model)), rtol=1e-3, atol=1e-3)
    assert len(calls) == 12


def test_weights_written_in_place_are_followed(llama):
    model = copy.deepcopy(llama)
    before = decode(model)
    model.model.layers[1].mlp.up_proj.scales.data.zero_()
    after = decode(model)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, decode(by_own_code(model)), rtol=2e-2, atol=2e-2)


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.mlp.up_proj.register_forward_hook(lambda m, a, out: out * 2),
        lambda layer: layer.self_attn.register_forward_pre_hook(lambda m, a: None),
        lambda layer: setattr(layer.mlp, "gate_proj", Adapter(layer.mlp.gate_proj)),
        lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
        lambda layer: setattr(layer.mlp, "forward", lambda x: x),
        lambda layer: setattr(layer, "post_attention_layernorm", nn.Identity()),
        lambda layer: layer.self_attn.train(),
        lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "sdpa"),
        lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "eager"),
    ],
)
def test_a_changed_layer_is_computed_by_its_own_code(llama, change, calls):
    model = copy.deepcopy(llama)
    decode(model)
    change(model.model.layers[0])
    calls.clear()
    out = decode(model)
    assert len(calls) == (0 if model.config._attn_implementation != "vlmq" else 2)
    torch.testing.assert_close(out, decode(by_own_code(model)), rtol=2e-2, atol=2e-2)


def test_other_caches_are_left_to_the_layers_own_code(llama, calls):
    cache = StaticCache(config=llama.config, max_cache_len=64)
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
        llama(IDS[:, :1], past_key_values=cache)
        llama(IDS[:, :1])
    assert calls == []


def test_gradients_pass(llama, calls):
    model, cache = copy.deepcopy(llama), DynamicCache(config=llama.config)
    decode(model, cache=cache)
    calls.clear()
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    model(IDS[:, :1], past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0
    assert calls == []


def test_hidden_states_are_still_captured(llama):
    out = []
    for model in (llama, by_own_code(llama)):
        cache = DynamicCache(config=model.config)
        decode(model, cache=cache)
        with torch.no_grad():
            out.append(model(IDS[:, :1], past_key_values=cache, output_hidden_states=True).hidden_states)
    assert len(out[0]) == len(out[1]) == 3
    for mine, theirs in zip(*out, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_copies_and_pickles_decode(calls):
    llama = packed(
        "llama", ("int4-g32",)
    )  # one without the hooks that capture hidden states, which no pickle takes
    expected = decode(llama)
    buffer = io.BytesIO()
    torch.save(llama, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(llama), torch.load(buffer, weights_only=False)):
        step = other.model.layers[0].forward
        assert step.layer is other.model.layers[0]
        calls.clear()
        assert torch.equal(decode(other), expected)
        assert calls


def test_a_step_is_installed_once_and_over_nobodys_forward(llama):
    model = copy.deepcopy(llama)
    first, mine = model.model.layers[0].forward, lambda *args, **kwargs: None
    model.model.layers[1].forward = mine
    install_steps(model)
    assert model.model.layers[0].forward is first
    assert model.model.layers[1].forward is mine


def test_layers_that_are_not_packed_are_left_alone(calls):
    model = packed("llama", ("int4-g32",))
    layer = model.model.layers[0].mlp
    layer.up_proj = nn.Linear(
        layer.up_proj.in_features, layer.up_proj.out_features, bias=False, dtype=model.dtype
    )
    decode(model)
    assert len(calls) == 2


def test_a_graph_is_made_of_the_layers_own_code(llama, calls, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    decode(llama)
    assert calls == []
