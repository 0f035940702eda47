"""The finder on every tiny family: what it calls a block, what it keeps and why."""

import pytest
import tiny_models
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5Model,
)

import vlmq
from vlmq.families import describe


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_describe_finds_both_stacks_of_two_blocks(family):
    layout = describe(tiny_models.build(family))
    n_blocks = {part: sum(b.part == part for b in layout.blocks) for part in ("vision", "language", "text")}
    if family in tiny_models.PLAIN_LANGUAGE:
        assert n_blocks == {"vision": 0, "language": 2, "text": 0}
    elif family in tiny_models.DUAL_ENCODERS:
        assert n_blocks == {"vision": 2, "language": 0, "text": 2}
    else:
        assert n_blocks == {"vision": 2, "language": 2, "text": 0}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_linear_is_quantized_or_kept_for_a_reason(family):
    model = tiny_models.build(family)
    layout = describe(model)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, info in layout.linears.items() if info.experts is None} == names
    for info in layout.linears.values():
        if info.kept is None:
            assert info.block is not None
            assert info.name.startswith(f"{info.block}.")
        if info.kept is None and info.experts is None:
            assert type(model.get_submodule(info.name)) is nn.Linear


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_blocks_do_not_nest_and_lie_in_their_tower(family):
    layout = describe(tiny_models.build(family))
    names = [block.name for block in layout.blocks]
    assert not any(a != b and a.startswith(f"{b}.") for a in names for b in names)
    for block in layout.blocks:
        if block.part != "projector":
            assert any(block.name.startswith(f"{t.name}.") and t.part == block.part for t in layout.towers)


def test_coverage_counts_all_parameters_and_those_of_experts():
    model = tiny_models.build("qwen3_vl_moe")
    layout = describe(model)
    covered = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (".blocks." in name or ".layers." in name)
    )
    experts = 2 * (4 * 64 * 64 + 4 * 64 * 32)
    assert layout.n_parameters == sum(p.numel() for p in model.parameters())
    assert layout.coverage == pytest.approx((covered + experts) / layout.n_parameters)
    assert not layout.experts


def test_fused_experts_are_listed_as_the_layers_that_they_are_taken_apart_into():
    layout = describe(tiny_models.build("qwen3_vl_moe"))
    found = [info for info in layout.linears.values() if info.experts is not None]
    assert len(found) == 2 * 4 * 2
    assert {info.part for info in found} == {"language"}
    first = layout.linears["model.language_model.layers.1.mlp.experts.3.gate_up_proj"]
    assert (first.in_features, first.out_features, first.n_bytes) == (64, 64, 4 * 64 * 64)
    assert first.block == "model.language_model.layers.1"
    last = layout.linears["model.language_model.layers.1.mlp.experts.3.down_proj"]
    assert (last.in_features, last.out_features) == (32, 64)


def test_experts_of_another_layout_are_named_with_their_size():
    model = tiny_models.build("qwen3_vl_moe")
    odd = nn.Module()
    odd.register_parameter("weight", nn.Parameter(torch.zeros(4, 64, 96)))
    model.set_submodule("model.language_model.layers.1.mlp.experts", odd)
    layout = describe(model)
    (found,) = layout.experts
    assert (found.name, found.part) == ("model.language_model.layers.1.mlp.experts.weight", "language")
    assert (found.shape, found.n_parameters) == ((4, 64, 96), 4 * 64 * 96)
    assert {i.experts for i in layout.linears.values()} == {None, "model.language_model.layers.0.mlp.experts"}
    assert "a layout that is NOT quantized" in str(vlmq.plan(model, "int4-g16"))


def test_kept_layers_say_why():
    kept = {
        family: {i.name: i.kept for i in describe(tiny_models.build(family)).linears.values()}
        for family in ("llava", "gemma3", "siglip", "clip")
    }
    assert kept["llava"]["lm_head"] == "lm_head"
    assert kept["llava"]["model.multi_modal_projector.linear_1"] == "projector (off by default)"
    assert kept["gemma3"]["lm_head"] == "embedding-tied"
    assert kept["siglip"]["vision_model.head.attention.out_proj"] == "multihead attention"
    assert kept["clip"]["visual_projection"] == "projection head"


def test_router_that_is_a_linear_is_kept():
    class Moe(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    class Model(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.layers = nn.ModuleList([Moe(), Moe()])

    linears = describe(Model(PreTrainedConfig())).linears
    assert linears["layers.0.gate"].kept == "router"
    assert linears["layers.0.experts.3"].kept is None


def test_encoders_and_encoder_decoders_have_blocks():
    bert = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    t5 = T5Config(d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, vocab_size=50)
    assert [b.part for b in describe(BertModel(bert)).blocks] == ["text", "text"]
    assert len(describe(T5Model(t5)).blocks) == 4


def test_model_without_blocks_is_refused():
    class Flat(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.only = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="Flat: found no list of blocks"):
        describe(Flat(PreTrainedConfig()))


def test_something_else_than_a_model_is_refused():
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel, got Linear"):
        describe(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_describe_works_on_the_meta_device():
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(tiny_models.FAMILIES["llava"]())
    assert len(describe(model).blocks) == 5
