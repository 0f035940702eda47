"""Captured inputs of every family equal those of a plain forward, on both paths, bit for bit."""

import copy

import pytest
import tiny_models
import torch
from torch import nn
from transformers import PreTrainedModel

from vlmq.calib.tokens import IMAGE, TEXT, CalibBatch
from vlmq.calib.trees import leaves, map_leaves
from vlmq.calib.walk import walk_blocks
from vlmq.families import describe

FAMILIES = list(tiny_models.FAMILIES)


def make_batches(family: str, n_batches: int = 2, rows: int = 1) -> list[CalibBatch]:
    made = tiny_models.inputs(family, n_batches, rows=rows)
    return [
        CalibBatch(b, torch.where(b["input_ids"] == tiny_models.IMAGE_TOKEN, IMAGE, TEXT).to(torch.int8))
        for b in made
    ]


def plain_inputs(model: PreTrainedModel, names: list[str], batches: list[CalibBatch]) -> dict[str, list]:
    """Arguments of every call of the named modules in the model's untouched forward."""
    seen: dict[str, list] = {name: [] for name in names}

    def hook(name: str):
        def listen(_, args, kwargs):
            seen[name].append(map_leaves(torch.clone, (args, kwargs)))

        return listen

    handles = [
        model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True, prepend=True)
        for n in names
    ]
    caches = [m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "use_cache")]
    before = [c.use_cache for c in caches]
    for config in caches:
        config.use_cache = False
    with torch.no_grad():
        for batch in batches:
            model(**copy.deepcopy(batch.inputs))
    for config, use_cache in zip(caches, before, strict=True):
        config.use_cache = use_cache
    for handle in handles:
        handle.remove()
    return seen


def assert_same_calls(calls: list, plain: list, where: str) -> None:
    assert len(calls) == len(plain), where
    for i, (call, (args, kwargs)) in enumerate(zip(calls, plain, strict=True)):
        mine, theirs = list(leaves((call.args, call.kwargs))), list(leaves((args, kwargs)))
        assert len(mine) == len(theirs), f"{where} call {i}"
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b), f"{where} call {i}"


def perturb(module: nn.Module) -> None:
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.weight.data.mul_(1.25)


def all_names(model: PreTrainedModel) -> list[str]:
    return [block.name for block in describe(model).blocks]


def all_parts(model: PreTrainedModel) -> set[str]:
    return {block.part for block in describe(model).blocks}


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_equal_a_plain_forward_when_nothing_is_quantized(family):
    model, batches = tiny_models.build(family), make_batches(family)
    plain = plain_inputs(model, all_names(model), batches)
    walked = []
    for block in walk_blocks(model, describe(model), batches, parts=all_parts(model)):
        walked.append(block.spec.name)
        assert_same_calls(block.inputs, plain[block.spec.name], block.spec.name)
        assert all(a is b for a, b in zip(block.inputs, block.original_inputs, strict=True))
    assert sorted(walked) == sorted(all_names(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_path_equals_a_plain_forward_of_its_model(family):
    model, batches = tiny_models.build(family), make_batches(family)
    plain_original = plain_inputs(model, all_names(model), batches)
    quantized, original = {}, {}
    for block in walk_blocks(model, describe(model), batches, parts=all_parts(model)):
        quantized[block.spec.name], original[block.spec.name] = block.inputs, block.original_inputs
        perturb(block.module)
    plain_quantized = plain_inputs(model, all_names(model), batches)
    for name in all_names(model):
        assert_same_calls(quantized[name], plain_quantized[name], f"quantized {name}")
        assert_same_calls(original[name], plain_original[name], f"original {name}")


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "clip", "llama"])
@pytest.mark.parametrize("part", ["vision", "language", "text"])
def test_a_walk_of_one_part_sees_the_others_as_they_are(family, part):
    model, batches = tiny_models.build(family), make_batches(family, rows=2)
    names = [b.name for b in describe(model).blocks if b.part == part]
    if not names:
        with pytest.raises(ValueError, match="no block to walk"):
            walk_blocks(model, describe(model), batches, parts={part})
        return
    captured = {}
    for block in walk_blocks(model, describe(model), batches, parts={part}):
        captured[block.spec.name] = block.inputs
        perturb(block.module)
    plain = plain_inputs(model, names, batches)
    assert list(captured) == names
    for name in names:
        assert_same_calls(captured[name], plain[name], name)
