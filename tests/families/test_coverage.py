"""Every parameter of a model counts once: quantized, kept for a reason, or outside of linear layers."""

import pytest
import tiny_models
from torch import nn

import vlmq
from vlmq.families import describe
from vlmq.families.coverage import NOT_PACKED, QUANTIZED, shares_of_packed


def by_what(found):
    return {share.what: (share.n_layers, share.n_parameters) for share in found}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_shares_sum_up_to_the_model(family):
    model = tiny_models.build(family)
    found = vlmq.plan(model, "int4-g16").shares()
    assert found[0].what == QUANTIZED
    assert sum(s.n_parameters for s in found) == sum(p.numel() for p in model.parameters())
    assert sum(s.share for s in found) == pytest.approx(1)
    assert all(s.n_parameters > 0 for s in found if s.what != "embedding-tied")


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl_moe", "siglip"])
def test_a_packed_model_has_the_shares_that_its_plan_had(family):
    model = tiny_models.build(family)
    before = vlmq.plan(model, "int4-g16").shares()
    vlmq.quantize(model, tiny_models.inputs(family, 1), "int4-g16", solver="rtn")
    assert by_what(shares_of_packed(describe(model))) == by_what(before)


def test_layers_left_by_an_override_are_named_so():
    model = tiny_models.build("llava")
    plan = vlmq.plan(model, "int4-g16")
    n_vision = sum(plan.part_of(name) == "vision" for name in plan.schemes)
    vlmq.quantize(model, tiny_models.inputs("llava", 1), "int4-g16", solver="rtn", overrides={"vision": None})
    assert by_what(shares_of_packed(describe(model)))[NOT_PACKED][0] == n_vision


def test_the_kinds_are_told_apart():
    model = tiny_models.build("qwen3_vl_moe")
    found = by_what(vlmq.plan(model, "int4-g16").shares())
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv3d)]
    assert found["embeddings"] == (0, sum(m.weight.numel() for m in tables))
    assert found["convolutions"] == (0, sum(m.weight.numel() for m in convolutions))
    assert found["lm_head"] == (1, 200 * 64)
    assert found["norms, biases and other parameters"][1] > 0


@pytest.mark.parametrize("family", ["internvl", "llama", "smolvlm"])
def test_packed_embeddings_count_as_quantized_and_nowhere_else(family):
    model = tiny_models.build(family)
    found = vlmq.plan(model, "int4-g16", embeddings="int8-g16").shares()
    assert sum(s.n_parameters for s in found) == sum(p.numel() for p in model.parameters())
    assert "lm_head" not in by_what(found)
    vlmq.quantize(model, tiny_models.inputs(family, 1), "int4-g16", solver="rtn", embeddings="int8-g16")
    assert by_what(shares_of_packed(describe(model))) == by_what(found)


def test_the_plan_says_what_is_kept_and_its_share():
    text = str(vlmq.plan(tiny_models.build("llava"), "int4-g16"))
    assert "kept: embeddings, " in text
    assert "kept: 2 layers (projector (off by default)), " in text
    assert text.count("% of all parameters") >= 5
