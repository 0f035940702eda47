"""A weight that several layers hold counts once, and is not quantized."""

import pytest
import tiny_models
import torch
import transformers as hf

import vlmq
from vlmq.families import describe
from vlmq.families.kept import SHARED

TEXT = {**tiny_models.TEXT, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


def diffusion_gemma():
    """An encoder and a decoder of the same weights, experts among them."""
    config = hf.DiffusionGemmaConfig(
        text_config={**TEXT, **EXPERTS},
        vision_config={**tiny_models.VISION, "model_type": "gemma4_vision", "head_dim": 8},
    )
    with torch.device("meta"):
        return hf.DiffusionGemmaForBlockDiffusion(config)


def test_every_parameter_counts_once():
    model = diffusion_gemma()
    plan = vlmq.plan(model, "int4-g16")
    found = {share.what: share for share in plan.shares()}
    assert sum(s.n_parameters for s in found.values()) == model.num_parameters()
    language = "model.decoder.layers."
    assert found[SHARED].n_parameters == sum(
        info.n_parameters for name, info in plan.layout.linears.items() if name.startswith(language)
    )
    assert 0 < plan.coverage < 1


def test_the_layer_that_counts_is_the_first():
    linears = describe(diffusion_gemma()).linears
    first, second = "model.encoder.language_model.layers.1.", "model.decoder.layers.1."
    for name in ("self_attn.q_proj", "experts.3.down_proj", "experts.0.gate_up_proj"):
        assert (linears[first + name].kept, linears[first + name].repeats) == (SHARED, None)
        assert (linears[second + name].kept, linears[second + name].repeats) == (SHARED, first + name)


def test_shared_weights_are_not_quantized_and_the_plan_says_so():
    model = diffusion_gemma()
    plan = vlmq.plan(model, "int4-g16")
    assert {plan.part_of(name) for name in plan.schemes} == {"vision"}
    assert any("are weights that layers share: NOT quantized" in line for line in plan.warnings())
    with pytest.raises(ValueError, match=f"cannot be quantized \\({SHARED}\\)"):
        vlmq.plan(model, "int4-g16", overrides={"model.decoder.*": "int8-g16"})


def test_a_model_that_shares_nothing_has_no_such_layer():
    for family in ("gemma3", "internvl", "qwen3_vl_moe"):
        linears = describe(tiny_models.build(family)).linears.values()
        assert not any(info.kept == SHARED or info.repeats for info in linears)
