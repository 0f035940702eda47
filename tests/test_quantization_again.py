"""A second run on a model that is quantized in part: the same blocks are seen, and what is packed stays as it is."""

import pytest
import tiny_models
import torch
from packed_models import logits

import vlmq
from vlmq.calib.saliency import SALIENCIES
from vlmq.calib.saliency_residual import attention_modules
from vlmq.families import describe
from vlmq.linear import QuantLinear
from vlmq.opening import open_empty

# Which part of a family is quantized first, and which one then.
HALVES = {
    "llava": ("language", "vision"),
    "qwen3_vl": ("language", "vision"),
    "clip": ("text", "vision"),
    "siglip": ("vision", "text"),
}


def packed(model) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def half_done(family: str, scheme: str = "int2-g32", dtype: torch.dtype = torch.float32):
    """A model of which the first half is packed, by a run that kept the other one."""
    model, batches = tiny_models.build(family, dtype), tiny_models.inputs(family, 2, dtype=dtype)
    vlmq.quantize(model, batches, scheme, overrides={HALVES[family][1]: None}, seed=3)
    return model, batches


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_layout_of_a_packed_model_is_the_layout_of_the_original(family):
    model = tiny_models.build(family)
    before = describe(model)
    vlmq.quantize(model, tiny_models.inputs(family, 1), "int4-g16", solver="rtn")
    after = describe(model)
    assert (after.blocks, after.towers, after.experts) == (before.blocks, before.towers, before.experts)
    assert after.n_parameters == before.n_parameters
    assert list(after.linears) == list(before.linears)
    for name, info in before.linears.items():
        expected = "already quantized to int4-g16" if info.kept is None else info.kept
        assert after.linears[name].kept == expected
        assert after.linears[name].n_parameters == info.n_parameters
        assert (after.linears[name].part, after.linears[name].block) == (info.part, info.block)


@pytest.mark.parametrize("family", HALVES)
def test_a_second_run_packs_the_rest_and_keeps_what_is_packed(family, tmp_path):
    model, batches = half_done(family, dtype=torch.bfloat16)
    first = packed(model)
    state = {name: layer.state_dict() for name, layer in first.items()}
    vlmq.quantize(model, batches, "int4-g16")
    assert all(packed(model)[name] is layer for name, layer in first.items())
    for name, tensors in state.items():
        assert all(torch.equal(tensor, first[name].state_dict()[key]) for key, tensor in tensors.items())
    added = {n: m for n, m in packed(model).items() if n not in first}
    assert {describe(model).linears[name].part for name in added} == {HALVES[family][1]}
    assert all(layer.report is not None for layer in added.values())
    vlmq.save(model, tmp_path / "packed")
    reloaded = vlmq.load(tmp_path / "packed")
    config = reloaded.config.quantization_config
    assert {s: len(names) for s, names in config.modules.items()} == {
        "int2-g32": len(first),
        "int4-g16": len(added),
    }
    assert config.metadata["earlier"]["seed"] == 3
    assert torch.equal(logits(reloaded, family), logits(model, family))


def test_packed_layers_run_in_the_forward_of_the_second_run(monkeypatch):
    """What comes after a packed tower is fitted to the tower's own outputs: the same as for a dequantized one."""
    monkeypatch.setenv("VLMQ_BACKEND", "reference")  # the CPU kernels round the inputs of few tokens
    model, batches = tiny_models.build("llava"), tiny_models.inputs("llava", 2)
    vlmq.quantize(model, batches, "int2-g32", overrides={"language": None})
    dense = tiny_models.build("llava")
    for name, layer in packed(model).items():
        dense.get_submodule(name).weight.data = layer.dequantize()
    vlmq.quantize(model, batches, "int4-g16")
    vlmq.quantize(dense, batches, "int4-g16", overrides={"vision": None})
    both = {name: (layer, packed(model)[name]) for name, layer in packed(dense).items()}
    assert both
    for ours, theirs in both.values():
        ours, theirs = ours.dequantize(), theirs.dequantize()
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_reloaded_model_takes_a_second_run(tmp_path):
    model, batches = half_done("llava")
    vlmq.save(model, tmp_path / "half")
    reloaded = vlmq.load(tmp_path / "half")
    for each in (model, reloaded):
        vlmq.quantize(each, batches, "int4-g16")
    vlmq.save(reloaded, tmp_path / "whole")
    again = vlmq.load(tmp_path / "whole")
    assert len(again.config.quantization_config.modules) == 2
    assert torch.equal(logits(again, "llava"), logits(model, "llava"))


def test_the_plan_from_the_config_alone_sees_packed_layers(tmp_path):
    model, _ = half_done("llava")
    vlmq.save(model, tmp_path / "half")
    plan, expected = vlmq.plan(open_empty(str(tmp_path / "half"))), vlmq.plan(model)
    assert plan.schemes == expected.schemes
    assert plan.kept == expected.kept
    assert plan.n_bytes_before == expected.n_bytes_before
    assert "kept: 14 layers (already quantized to int2-g32)" in str(plan)


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_blocks_that_are_packed_in_part_take_every_saliency(saliency):
    model, batches = tiny_models.build("llava"), tiny_models.inputs("llava", 2)
    attention = {"*": None, "*.self_attn.*": "int2-g16"}
    vlmq.quantize(model, batches, "int2-g32", overrides=attention)
    first = set(packed(model))
    vlmq.quantize(model, batches, "int4-g16", saliency=saliency)
    assert first < set(packed(model))
    assert not any("self_attn" in name for name in set(packed(model)) - first)


def test_attention_is_found_when_it_is_packed():
    model, _ = half_done("llava")
    block = model.get_submodule(describe(model).blocks[-1].name)
    assert list(attention_modules(block)) == ["self_attn"]


def test_the_expected_size_counts_packed_layers_as_they_are(tmp_path):
    model, batches = half_done("llava", dtype=torch.bfloat16)
    plan = vlmq.plan(model, "int4-g16")
    assert plan.n_bytes_before == sum(p.numel() * p.element_size() for p in model.parameters())
    vlmq.quantize(model, batches, "int4-g16")
    assert plan.n_bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())


def test_overrides_that_name_packed_layers_are_refused_unless_they_keep_them():
    model, _ = half_done("llava")
    message = "override 'language' .*: layer '.*' is already quantized to int2-g32 and is not quantized again; start"
    with pytest.raises(ValueError, match=message):
        vlmq.plan(model, overrides={"language": "int4-g16"})
    kept = vlmq.plan(model, overrides={"language": None}).kept
    assert sum(reason == "already quantized to int2-g32" for reason in kept.values()) == len(packed(model))


def test_asking_again_for_everything_says_that_nothing_is_left():
    model, batches = tiny_models.build("clip"), tiny_models.inputs("clip", 1)
    vlmq.quantize(model, batches, "int4-g16")
    message = (
        r"nothing is left to quantize; kept: 24 layers \(already quantized to int4-g16\); kept: 2 layers"
    )
    with pytest.raises(ValueError, match=message):
        vlmq.quantize(model, batches, "int4-g16")


def test_a_model_quantized_by_another_method_is_refused():
    model: object = tiny_models.build("llama")
    model.hf_quantizer = object()
    with pytest.raises(
        ValueError, match="the model is already quantized by object; start from full precision"
    ):
        vlmq.plan(model)
