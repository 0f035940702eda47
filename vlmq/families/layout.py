"""The layout of a model: its blocks, the part of every linear layer, and what cannot be quantized.

A finder for all families, without code per family: the outermost lists of modules that hold linear layers are
the stacks of blocks; names on the path sort them into vision, projector, language and text; what lies outside
the stacks is named together with the reason why it stays as it is. Fused experts are listed as the linear layers that
they are taken apart into (`vlmq.families.experts`). Coverage is counted in parameters of the whole model, so that
experts of another layout, which no linear layer covers, are seen. Layers that are packed already are found and
counted as before, and kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from vlmq.families.experts import is_fused, layers_of
from vlmq.families.kept import SHARED, prefixes, why_kept
from vlmq.families.outside import is_foreign_expert, outside_linears
from vlmq.families.packed import (
    count_parameters,
    is_packed,
    is_plain_or_packed,
    scheme_name,
    stored_bytes,
)
from vlmq.families.parts import AUDIO, is_projector_name, part_of

ALREADY_QUANTIZED = "already quantized"


@dataclass(frozen=True)
class BlockSpec:
    """A module that is walked as one unit, or a tower (a module around blocks): its path and its part."""

    name: str
    part: str


@dataclass(frozen=True)
class LinearInfo:
    """One linear layer.

    Attributes:
        name: path in the model.
        part: "vision", "projector", "language", "text" or "audio".
        block: path of the block that holds it; None outside the blocks.
        kept: why it stays in full precision by default; None if it is quantized.
        in_features: inputs.
        out_features: outputs.
        n_bytes: bytes of its weight, as it is stored now.
        experts: path of the fused experts that it is a part of; None if it is a module of its own.
        repeats: path of the layer before it whose weight it shares, and which counts for both; None if there is none.
    """

    name: str
    part: str
    block: str | None
    kept: str | None
    in_features: int
    out_features: int
    n_bytes: int
    experts: str | None = None
    repeats: str | None = None

    @property
    def n_parameters(self) -> int:
        """Number of its weights, without the bias."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ExpertInfo:
    """Experts in one parameter (n_experts, rows, columns) of a layout that cannot be quantized."""

    name: str
    part: str
    shape: tuple[int, ...]
    n_parameters: int


@dataclass(frozen=True)
class Layout:
    """What `describe` found.

    Attributes:
        blocks: in the order of the model's modules; blocks do not nest.
        linears: every linear layer by its path.
        towers: outermost modules whose blocks all belong to one part; its blocks lie under its path.
        experts: expert parameters that are not taken apart into linear layers.
        others: number of parameters outside of linear layers, by kind (`vlmq.families.outside`).
        n_parameters: all parameters of the model, tied ones counted once, packed layers with their weights.
    """

    blocks: tuple[BlockSpec, ...]
    linears: dict[str, LinearInfo]
    towers: tuple[BlockSpec, ...]
    experts: tuple[ExpertInfo, ...]
    others: dict[str, int]
    n_parameters: int

    @property
    def coverage(self) -> float:
        """Share of all parameters that lie in linear layers quantized by default."""
        covered = sum(linear.n_parameters for linear in self.linears.values() if linear.kept is None)
        return covered / self.n_parameters


def describe(model: PreTrainedModel) -> Layout:
    """Find the blocks, linear layers and experts of `model`.

    Raises:
        TypeError: not a transformers model.
        ValueError: no block with linear layers was found.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    blocks = tuple(_find_blocks(model))
    if not any(block.part != "projector" for block in blocks):
        raise ValueError(
            f"{type(model).__name__}: found no list of blocks that hold torch.nn.Linear layers, so there is "
            "nothing to quantize; expected an nn.ModuleList of transformer blocks, such as 'model.layers'"
        )
    experts = tuple(_find_experts(model))
    return Layout(
        blocks=blocks,
        linears={info.name: info for info in _find_linears(model, blocks)},
        towers=tuple(_find_towers(blocks)),
        experts=experts,
        others=outside_linears(model, {expert.name for expert in experts}),
        n_parameters=count_parameters(model),
    )


def _has_linears(module: nn.Module) -> bool:
    return any(is_plain_or_packed(m) for m in module.modules())


def _is_stack(module: nn.Module) -> bool:
    """A list of blocks: a ModuleList, or a Sequential of equal blocks, whose items hold linear layers."""
    items = list(module.children())
    if not any(not is_plain_or_packed(item) and _has_linears(item) for item in items):
        return False
    if isinstance(module, nn.ModuleList):
        return True
    n_linears = [sum(is_plain_or_packed(m) for m in item.modules()) for item in items]
    return (
        isinstance(module, nn.Sequential)
        and len(items) > 1
        and len({type(i) for i in items}) == 1
        and min(n_linears) > 1
    )


def _find_blocks(model: PreTrainedModel) -> Iterator[BlockSpec]:
    """Blocks in the order of modules, found from the root down; a found block is not searched further."""

    def search(name: str, module: nn.Module) -> Iterator[BlockSpec]:
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if not _has_linears(child) or is_plain_or_packed(child):
                continue
            in_stack = _is_stack(module) and not isinstance(child, nn.ModuleList)
            is_bridge = is_projector_name(path) and not any(_is_stack(m) for m in child.modules())
            if in_stack or (is_bridge and not isinstance(child, nn.ModuleList)):
                part = part_of(model, path, child)
                if part != AUDIO:
                    yield BlockSpec(path, part)
            else:
                yield from search(path, child)

    yield from search("", model)


def _find_towers(blocks: tuple[BlockSpec, ...]) -> Iterator[BlockSpec]:
    """For every stack the outermost module, not the model itself, whose blocks are all of its part.

    Bridges inside a tower (the mergers of Qwen-VL lie in `visual`) do not count against it.
    """
    seen = set()
    for block in blocks:
        components = block.name.split(".")
        for depth in range(1, len(components) - 1):
            prefix = ".".join(components[:depth])
            parts = {b.part for b in blocks if b.name.startswith(f"{prefix}.")} - {"projector"}
            if parts <= {block.part}:
                if prefix not in seen and parts:
                    yield BlockSpec(prefix, block.part)
                seen.add(prefix)
                break


def _find_linears(model: PreTrainedModel, blocks: tuple[BlockSpec, ...]) -> Iterator[LinearInfo]:
    part_of_block = {block.name: block.part for block in blocks}
    first = _first_of_shared(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and not is_packed(module) and not is_fused(module):
            continue
        block = next((b for b in prefixes(name) if b in part_of_block), None)
        part = part_of_block[block] if block is not None else part_of(model, name, module)
        if is_packed(module):
            kept = f"{ALREADY_QUANTIZED} to {scheme_name(module)}"
            sizes = module.in_features, module.out_features, stored_bytes(module)
            yield LinearInfo(name, part, block, kept, *sizes)
        elif isinstance(module, nn.Linear):
            weight = module.weight
            owner = first.get(id(weight))
            kept = why_kept(model, name, module, part, block) if owner is None else SHARED
            out_features, in_features = weight.shape
            sizes = in_features, out_features, weight.numel() * weight.element_size()
            repeats = None if owner == name else owner
            yield LinearInfo(name, part, block, kept, *sizes, repeats=repeats)
        else:
            kept = None if block is not None else "outside the blocks"
            owner = first.get(id(module.down_proj))
            kept = kept if owner is None else SHARED
            for layer in layers_of(module):
                path = f"{layer.expert}.{layer.projection}"
                sizes = layer.in_features, layer.out_features, layer.n_bytes
                repeats = None if owner in (None, name) else f"{owner}.{path}"
                yield LinearInfo(f"{name}.{path}", part, block, kept, *sizes, experts=name, repeats=repeats)


def _first_of_shared(model: PreTrainedModel) -> dict[int, str]:
    """id of each weight that several linear layers or fused experts hold, no embedding -> path of the first of them."""
    owners: dict[int, list[str]] = {}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            owners.setdefault(id(module.weight), []).append(name)
        elif is_fused(module):
            owners.setdefault(id(module.down_proj), []).append(name)
    return {key: names[0] for key, names in owners.items() if len(names) > 1 and key not in tables}


def _find_experts(model: PreTrainedModel) -> Iterator[ExpertInfo]:
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            path = f"{name}.{key}" if name else key
            if is_foreign_expert(module, path, parameter):
                part = part_of(model, path.rpartition(".")[0], module)
                yield ExpertInfo(path, part, tuple(parameter.shape), parameter.numel())
