"""The table of saliencies, each entry on models of several families, and the post-processing that they share."""

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor, nn

from vlmq.calib.saliency import SALIENCIES, PostProcess, effective_tokens, postprocess, prepare
from vlmq.calib.tokens import ANSWER, IMAGE, PADDING, TEXT, CalibBatch
from vlmq.calib.walk import walk_blocks
from vlmq.families import describe

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "gemma3", "internvl", "clip", "llama")


def batches_of(family: str, n_batches: int = 2, rows: int = 2) -> list[CalibBatch]:
    """Batches whose last row is padded where the family takes a mask."""
    made = []
    for batch in tiny_models.inputs(family, n_batches, rows=rows):
        ids = batch["input_ids"]
        kinds = torch.full(ids.shape, TEXT, dtype=torch.int8)
        kinds[ids == tiny_models.IMAGE_TOKEN] = IMAGE
        kinds[0, -3:] = ANSWER
        if "attention_mask" in batch:
            batch["attention_mask"][-1, -2:] = 0
            kinds[-1, -2:] = PADDING
        made.append(CalibBatch(batch, kinds))
    return made


def disturb(block_module: nn.Module, generator: torch.Generator) -> None:
    """Stand in for quantization."""
    for module in block_module.modules():
        if type(module) is nn.Linear:
            noise = torch.randn(module.weight.shape, generator=generator)
            module.weight = nn.Parameter(module.weight.detach() + 0.03 * noise)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SALIENCIES)
def test_every_saliency_gives_one_weight_per_token_of_every_layer(name, family):
    model, batches = tiny_models.build(family), batches_of(family)
    layout = describe(model)
    trained = [p.requires_grad for p in model.parameters()]
    context = prepare(name, model, layout, batches)
    assert [p.requires_grad for p in model.parameters()] == trained
    generator = torch.Generator().manual_seed(0)
    n_layers = 0
    for block in walk_blocks(model, layout, batches):
        n_tokens = count_by_hooks(block)
        with torch.no_grad():
            weights = SALIENCIES[name](block, context)
        assert weights.keys() == block.linears().keys()
        for layer, calls in weights.items():
            n_layers += 1
            assert [w.shape for w in calls] == [(n,) for n in n_tokens[layer]]
            for weight, kinds in zip(calls, block.batches, strict=True):
                assert weight.dtype == torch.float32
                assert torch.isfinite(weight).all()
                assert (weight >= 0).all()
                if kinds.numel() == weight.numel():
                    weight, valid = weight.reshape(kinds.shape), kinds != PADDING
                    assert (weight[~valid] == 0).all()
                    torch.testing.assert_close(weight.sum(dim=1), valid.sum(dim=1).float())
                    assert (weight[valid] > 0.02).all()
        disturb(block.module, generator)
    assert n_layers > 0


def count_by_hooks(block) -> dict[str, list[int]]:
    counts = {name: [0] * len(block.inputs) for name in block.linears()}
    for i, call in enumerate(block.inputs):
        handles = []
        for name, module in block.linears().items():

            def add(module, args, name=name, i=i):
                counts[name][i] += args[0][..., 0].numel()

            handles.append(module.register_forward_pre_hook(add))
        with torch.no_grad():
            block.run(call)
        for handle in handles:
            handle.remove()
    return counts


@pytest.mark.parametrize("family", ["llava", "clip"])
def test_saliencies_other_than_uniform_tell_tokens_apart(family):
    batches = batches_of(family)
    spread = {}
    for name in SALIENCIES:
        model = tiny_models.build(family)
        layout = describe(model)
        context = prepare(name, model, layout, batches)
        generator = torch.Generator().manual_seed(0)
        effective = []
        for block in walk_blocks(model, layout, batches):
            for calls in SALIENCIES[name](block, context).values():
                effective.append(effective_tokens(calls) / sum(int((w > 0).sum()) for w in calls))
            disturb(block.module, generator)
        spread[name] = min(effective)
    assert spread.pop("uniform") == pytest.approx(1.0)
    if family == "clip":
        # A tower sees one kind of token.
        assert spread.pop("modality") == pytest.approx(1.0)
    assert all(share < 0.999 for share in spread.values()), spread


def test_prepare_rejects_unknown_names_and_labels():
    model = tiny_models.build("llama")
    with pytest.raises(ValueError, match="saliency 'entropy' is unknown; known: uniform block_grad"):
        prepare("entropy", model, describe(model), [])
    with pytest.raises(
        ValueError, match="labels of saliency 'loss_grad' must be 'data' or 'model', got 'true'"
    ):
        prepare("loss_grad", model, describe(model), [], labels="true")


@pytest.mark.parametrize("name", ["loss_grad", "modality"])
def test_a_context_of_another_saliency_is_refused(name):
    model, batches = tiny_models.build("llama"), batches_of("llama", 1)
    layout = describe(model)
    block = next(walk_blocks(model, layout, batches))
    with pytest.raises(ValueError, match=f"make the context by prepare\\('{name}'"):
        SALIENCIES[name](block, prepare("uniform", model, layout, batches))


def test_nan_inputs_name_the_layer_and_the_batch():
    model, batches = tiny_models.build("llama"), batches_of("llama", 2)
    layout = describe(model)
    block = next(walk_blocks(model, layout, batches))
    hidden = next(
        t for t in (*block.inputs[1].args, *block.inputs[1].kwargs.values()) if isinstance(t, Tensor)
    )
    hidden[0, 3] = torch.nan
    with pytest.raises(
        RuntimeError, match=r"'act_norm', layer model.layers.0.self_attn.\w+, batch 1: .* got nan"
    ):
        SALIENCIES["act_norm"](block, prepare("act_norm", model, layout, batches))


scores_and_kinds = array_shapes(min_dims=2, max_dims=2, max_side=40).flatmap(
    lambda shape: st.tuples(
        arrays("float32", shape, elements=st.floats(0, 2**20, width=32)),
        arrays("int8", shape, elements=st.integers(0, 3)),
    )
)
options = st.fixed_dictionaries(
    {
        "clip": st.sampled_from([0.5, 0.99, 1.0]),
        "floor": st.sampled_from([0.0, 0.05, 0.3]),
        "power": st.sampled_from([0.5, 1.0, 2.0]),
        "temperature": st.sampled_from([0.0, 0.7, 1.0]),
        "average_kinds": st.booleans(),
    }
)


@settings(max_examples=150, deadline=None)
@given(scores_and_kinds, options, st.sampled_from([1e-12, 1e-3, 1e6]))
def test_postprocess_keeps_its_promises(pair, chosen, scale):
    raw, kinds = (torch.from_numpy(array.copy()) for array in pair)
    weights = postprocess(raw, kinds, **chosen)
    valid = kinds != PADDING
    assert weights.shape == raw.shape
    assert weights.dtype == torch.float32
    assert (weights[~valid] == 0).all()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), valid.sum(dim=1).float(), rtol=1e-4, atol=0)
    assert (weights[valid] >= chosen["floor"] / (1 + chosen["floor"]) * 0.999).all()
    torch.testing.assert_close(
        postprocess(raw.double() * scale, kinds, **chosen), weights, rtol=1e-4, atol=1e-6
    )
    disturbed = torch.where(valid, raw, torch.nan)
    assert torch.equal(postprocess(disturbed, kinds, **chosen), weights)


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, 1e30])
def test_postprocess_of_equal_scores_is_uniform(value):
    kinds = torch.tensor([[TEXT, IMAGE, PADDING, TEXT, ANSWER], [PADDING] * 5], dtype=torch.int8)
    weights = postprocess(torch.full((2, 5), value), kinds, power=2.0)
    assert torch.equal(weights, (kinds != PADDING).float())


def test_postprocess_by_hand():
    kinds = torch.tensor([TEXT, IMAGE, IMAGE, ANSWER, PADDING], dtype=torch.int8)
    raw = torch.tensor([0.0, 1.0, 3.0, 4.0, 100.0])
    # mean 2: floor 0.5 * 2 = 1 -> (1, 1, 3, 4), mean 2.25
    expected = torch.tensor([1, 1, 3, 4, 0]) / 2.25
    torch.testing.assert_close(postprocess(raw, kinds, clip=1, floor=0.5), expected)
    expected = torch.tensor([0, 2, 2, 4, 0]) / 2
    torch.testing.assert_close(postprocess(raw, kinds, clip=1, floor=0, average_kinds=True), expected)
    expected = torch.tensor([0.5, 0.75, 1.25, 1.5, 0])
    torch.testing.assert_close(postprocess(raw, kinds, clip=1, floor=0, temperature=0.5), expected)
    # the median of 0, 1, 3, 4 is 2
    expected = torch.tensor([0, 1, 2, 2, 0]) / 1.25
    torch.testing.assert_close(postprocess(raw, kinds, clip=0.5, floor=0), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_postprocess_names_a_bad_score(bad):
    raw = torch.ones(2, 4)
    raw[1, 2] = bad
    kinds = torch.ones(2, 4, dtype=torch.int8)
    with pytest.raises(
        RuntimeError, match="block 'b', batch 7: expected finite scores >= 0, got .* row 1, token 2"
    ):
        postprocess(raw, kinds, where="block 'b', batch 7")


@pytest.mark.parametrize("wrong", [{"clip": 0}, {"floor": 1}, {"power": 0}, {"temperature": 2}])
def test_postprocess_rejects_options_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"got .*{next(iter(wrong))} {next(iter(wrong.values()))}"):
        postprocess(torch.ones(3), torch.ones(3, dtype=torch.int8), **wrong)


def test_postprocess_rejects_different_shapes():
    with pytest.raises(ValueError, match=r"scores \(3,\) and kinds \(4,\) must have one shape"):
        postprocess(torch.ones(3), torch.ones(4, dtype=torch.int8))


def test_the_post_processing_of_the_context_is_applied():
    model, batches = tiny_models.build("llava"), batches_of("llava", 1)
    layout = describe(model)
    block = next(walk_blocks(model, layout, batches))
    context = prepare("act_norm", model, layout, batches, post=PostProcess(temperature=0.0))
    for calls in SALIENCIES["act_norm"](block, context).values():
        assert torch.equal(calls[0], torch.ones_like(calls[0]))


def test_effective_tokens():
    assert effective_tokens([torch.ones(5), torch.tensor([1.0, 0.0])]) == pytest.approx(6)
    assert effective_tokens([torch.tensor([3.0, 1.0])]) == pytest.approx(1.6)
    assert effective_tokens([torch.zeros(3)]) == 0
