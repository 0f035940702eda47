"""Packed experts in the layout of published checkpoints: one layer per expert and projection.

    <experts>.<e>.gate_up_proj (2 width, in)  ->  <experts>.<e>.gate_proj (width, in), <experts>.<e>.up_proj (width, in)
    <experts>.<e>.down_proj                   ->  <experts>.<e>.down_proj

The rows of the fused projection are the gate's, then the others, so they are cut in two and no value changes. Where a
family's checkpoints say w1, w3 and w2, so does the export: transformers' own rules for saving are asked, with rows that
tell their halves apart. Readers run all experts of a model as one, so these share bits and groups.

Not written: experts with a bias, without a gate, with a gate of their own (its rows may be interleaved), sorted ones
(Llama 4), and blocks of which only some experts are packed.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vlmq.exports.grid import IntegerGrid, share, whole_groups
from vlmq.families.experts import DOWN, UnfusedExperts, is_fused
from vlmq.linear import QuantLinear

LEAVES = ("gate_proj", "up_proj", "down_proj")
LAYER = re.compile(r"(.*\.experts)\.\d+\.\w+$")


def why_not(experts: UnfusedExperts) -> str | None:
    """The reason why experts cannot be written in this layout; None if they can."""
    contract, rules = experts.contract, experts._rules[0]
    if contract.has_bias:
        return "its experts have biases, which readers keep in layouts of their own"
    if not contract.has_gate:
        return "its experts have no gate"
    if contract.is_sorted:
        return "its experts take sorted tokens, which readers keep in layouts of their own"
    is_plain = getattr(getattr(type(rules), "_apply_gate", None), "__name__", "") == "_default_apply_gate"
    if (
        not is_plain
        or not getattr(rules, "is_concatenated", True)
        or getattr(rules, "has_post_expert_norm", False)
    ):
        return "its experts have a gate or a norm of their own, or rows in another order"
    layers = [experts.get_submodule(name) for name in experts.layer_names()]
    if n_kept := sum(not isinstance(layer, QuantLinear) for layer in layers):
        return f"{n_kept} of its {len(layers)} layers are in full precision, and readers quantize all or none"
    return None


def check(model: PreTrainedModel) -> None:
    """Check that all packed experts can be written.

    Raises:
        ValueError: some cannot; the message says why.
    """
    for path, experts in unfused(model).items():
        if reason := why_not(experts):
            raise ValueError(f"{path!r} holds packed experts that cannot be written one by one: {reason}")


def unfused(model: nn.Module) -> dict[str, UnfusedExperts]:
    """The modules of packed experts by their path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UnfusedExperts)}


def kept_experts(model: nn.Module) -> list[str]:
    """Paths of fused experts in full precision."""
    return [name for name, module in model.named_modules() if is_fused(module)]


def split(model: PreTrainedModel, grids: Mapping[str, IntegerGrid]) -> dict[str, IntegerGrid]:
    """All layers under the names that the export gives them in memory's paths, gate and up apart.

    Args:
        model: the packed model.
        grids: its layers by their path.
    """
    names: dict[str, tuple[str, ...]] = {}
    for path, experts in unfused(model).items():
        gate, up, down = published_leaves(model, path) or LEAVES
        for e in range(experts.n_experts):
            names[f"{path}.{e}.{experts.up}"] = (f"{path}.{e}.{gate}", f"{path}.{e}.{up}")
            names[f"{path}.{e}.{DOWN}"] = (f"{path}.{e}.{down}",)
    apart: dict[str, IntegerGrid] = {}
    for name, grid in grids.items():
        parts = names.get(name, (name,))
        n_rows = len(grid.values) // len(parts)
        for i, part in enumerate(parts):
            rows = slice(i * n_rows, (i + 1) * n_rows)
            zeros = None if grid.zeros is None else grid.zeros[rows]
            apart[part] = replace(grid, values=grid.values[rows], scales=grid.scales[rows], zeros=zeros)
    return apart


def published_leaves(model: PreTrainedModel, path: str) -> tuple[str, ...] | None:
    """What the family's checkpoints call gate, up and down of one expert; None where they keep experts fused."""
    halves = torch.tensor([[[0.0], [1.0]]])  # (1, 2, 1): one expert, a row of its gate and one of the other
    known: Any = revert_weight_conversion
    written = known(model, {f"{path}.gate_up_proj": halves, f"{path}.{DOWN}": torch.tensor([[[2.0]]])})
    found = {}
    for name, tensor in written.items():
        if leaf := re.search(r"\.0\.(\w+)\.weight$", name):
            found[int(tensor)] = leaf[1]
    return tuple(found[i] for i in range(3)) if found.keys() == {0, 1, 2} else None


def notes(model: PreTrainedModel) -> list[str]:
    """What a reader of transformers must know."""
    paths = list(unfused(model))
    if not paths or published_leaves(model, paths[0]) is not None:
        return []
    return [
        f"checkpoints of this family keep the experts of a block in one tensor ({paths[0]!r}), so transformers does "
        "not find these, which are one by one, and fills its own with random numbers; vLLM does find them"
    ]


def align(grids: Mapping[str, IntegerGrid]) -> dict[str, IntegerGrid]:
    """One scheme for all experts of a model, with groups of one size; other layers as they are."""
    names = [name for name in grids if LAYER.match(name)]
    shared = share([whole_groups(grids[name]) for name in names]) if names else []
    return {**grids, **dict(zip(names, shared, strict=True))}


def path_on_disk(path: str, disk: Mapping[str, str]) -> str:
    """The path of experts on disk, of the names of their layers."""
    known = next(
        written for name, written in disk.items() if LAYER.match(name) and name.startswith(f"{path}.")
    )
    found = LAYER.match(known)
    assert found is not None, known
    return found[1]
