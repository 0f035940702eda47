"""What a walk must hand out, taken from the model's untouched forward."""

import copy

import tiny_models
import torch
from torch import nn
from transformers import PreTrainedModel

from vlmq.calib.tokens import IMAGE, TEXT, CalibBatch
from vlmq.calib.trees import leaves, map_leaves
from vlmq.calib.walk import Block, walk_blocks
from vlmq.families import describe


def make_batches(
    family: str, n_batches: int = 2, *, rows: int = 1, dtype: torch.dtype = torch.float32
) -> list[CalibBatch]:
    made = tiny_models.inputs(family, n_batches, rows=rows, dtype=dtype)
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
            layer.weight = nn.Parameter(1.25 * layer.weight.detach())


def all_names(model: PreTrainedModel) -> list[str]:
    return [block.name for block in describe(model).blocks]


def all_parts(model: PreTrainedModel) -> set[str]:
    return {block.part for block in describe(model).blocks}


def assert_exact(model: PreTrainedModel, batches: list[CalibBatch], parts: set[str] | None = None) -> None:
    """Walk with every block perturbed, and compare both paths with plain forwards before and after."""
    chosen = all_parts(model) if parts is None else parts
    names = [b.name for b in describe(model).blocks if b.part in chosen]
    original = plain_inputs(model, names, batches)
    walked: dict[str, Block] = {}
    for block in walk_blocks(model, describe(model), batches, parts=chosen):
        walked[block.spec.name] = block
        perturb(block.module)
    quantized = plain_inputs(model, names, batches)
    assert set(walked) == set(names)
    for name in names:
        assert_same_calls(walked[name].inputs, quantized[name], f"quantized {name}")
        assert_same_calls(walked[name].original_inputs, original[name], f"original {name}")
