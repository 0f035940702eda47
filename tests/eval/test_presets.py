"""Presets: random models of known shapes, dense and packed."""

import pytest
import torch
import transformers

from vlmq.eval.presets import PRESETS, build_preset
from vlmq.linear import QuantLinear

SIZES = {"qwen2.5-vl-7b": 8.29e9, "llama-7b": 6.74e9}


@pytest.mark.parametrize("scheme", [None, "int4-g64", "ternary-channel", "int3-g32", "binary2-g64"])
def test_a_preset_computes_finite_logits_of_some_spread(scheme):
    model = build_preset("llama-tiny", scheme)
    ids = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    assert any(isinstance(m, QuantLinear) for m in model.modules()) == (scheme is not None)


def test_the_same_seed_gives_the_same_model():
    states = [build_preset("llama-tiny", "ternary-g64", seed=s).state_dict() for s in (3, 3, 4)]
    assert all(torch.equal(a, states[1][name]) for name, a in states[0].items())
    assert not all(torch.equal(a, states[2][name]) for name, a in states[0].items())


def test_a_packed_preset_saves_and_reloads(tmp_path):
    model = build_preset("llama-tiny", "int4-g64")
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reloaded(input_ids=ids).logits)


@pytest.mark.parametrize("name", list(SIZES))
def test_large_presets_have_the_published_number_of_parameters(name):
    config = PRESETS[name]()
    auto = transformers.AutoModelForImageTextToText if "vl" in name else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        n_parameters = auto.from_config(config).num_parameters()
    assert n_parameters == pytest.approx(SIZES[name], rel=2e-3)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="preset 'llama-70b' is unknown; known: qwen2.5-vl-7b"):
        build_preset("llama-70b", None)
