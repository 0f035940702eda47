"""The vision part of a model as llama.cpp lays it out: the words that `vlmq.exports.mmproj_families` uses.

llama.cpp wants tower and projector as a file of their own, with a name for what computes them (`projector`).

Where a tower has a class token, llama.cpp of October 2026 puts it behind the patches while the tables of positions
begin with it, so its row is written last (`class_row_last`). Pixtral's rows of q and k alternate the halves of a head,
as in the text part.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.exports.gguf_layout import interleaved_halves

LAYERS: dict[str, str | tuple[str, ...]] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
ACTIVATIONS = {
    "quick_gelu": {},
    "gelu": {"clip.use_gelu": True},
    "gelu_pytorch_tanh": {"clip.use_gelu": True},
    "silu": {"clip.use_silu": True},
}


@dataclass(frozen=True)
class Piece:
    """A module under its name in the file; `rows` are the places that its rows are taken from, None for all."""

    name: str
    path: str
    module: nn.Module
    rows: Tensor | None = None


@dataclass(frozen=True)
class Lone:
    """A parameter under its name in the file, and what is made of it."""

    name: str
    path: str
    take: Callable[[Tensor], Tensor] = torch.Tensor.detach


@dataclass(frozen=True)
class VisionPart:
    """Tower and projector of a model.

    Attributes:
        projector: llama.cpp's name of what computes them.
        pieces: modules with a weight, and a bias perhaps.
        lone: parameters that stand alone or are reshaped.
        sizes: fields of the header, by their keys.
        unused: paths of what the model does not compute with either.
        notes: what differs in llama.cpp.
    """

    projector: str
    pieces: tuple[Piece, ...]
    lone: tuple[Lone, ...]
    sizes: dict[str, Any]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def class_row_last(positions: Tensor) -> Tensor:
    """A table of positions whose first row is that of the class token, with this row at the end."""
    rows = positions.detach().reshape(-1, positions.shape[-1])
    return rows.roll(-1, 0)


def pieces_of(model: PreTrainedModel, root: str, names: Mapping[str, str | tuple[str, ...]]) -> list[Piece]:
    """The modules under a path that are there; a tuple of names takes equal parts of the rows."""
    found: list[Piece] = []
    inside = dict(model.get_submodule(root).named_modules())
    for name, written in names.items():
        module = inside.get(name)
        if module is None or isinstance(module, nn.Identity):
            continue
        path = f"{root}.{name}"
        if isinstance(written, str):
            found.append(Piece(written, path, module))
            continue
        n_rows = int(module.out_features)  # pyright: ignore[reportArgumentType]
        for part, rows in zip(written, torch.arange(n_rows).chunk(len(written)), strict=True):
            found.append(Piece(part, path, module, rows))
    return found


def block_pieces(
    model: PreTrainedModel, root: str, n_layers: int, names: Mapping[str, str | tuple[str, ...]]
) -> list[Piece]:
    """The modules of the first blocks of a tower."""
    found: list[Piece] = []
    for i in range(n_layers):
        inside = {
            name: f"v.blk.{i}.{w}" if isinstance(w, str) else tuple(f"v.blk.{i}.{part}" for part in w)
            for name, w in names.items()
        }
        found += pieces_of(model, f"{root}.{i}", inside)
    return found


def tower_sizes(
    model: PreTrainedModel, n_layers: int, *, eps: float, width: int | None = None, **other: Any
) -> dict[str, Any]:
    """Fields of the header that all families have; `other` replaces or adds fields of clip.vision.

    Raises:
        ValueError: an activation that llama.cpp has no word for.
    """
    vision = model.config.vision_config
    act = vision.hidden_act
    if act not in ACTIVATIONS:
        raise ValueError(f"llama.cpp computes towers with {', '.join(ACTIVATIONS)}, this one has {act!r}")
    width = width or vision.hidden_size
    n_heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
    sizes = {
        "image_size": _side(getattr(vision, "image_size", 560)),
        "patch_size": _side(vision.patch_size),
        "embedding_length": width,
        "feed_forward_length": getattr(vision, "intermediate_size", None),
        "projection_dim": model.config.get_text_config().hidden_size,
        "block_count": n_layers,
        "attention.head_count": n_heads,
        "attention.layer_norm_epsilon": float(eps),
    } | other
    return {f"clip.vision.{key}": value for key, value in sizes.items()} | ACTIVATIONS[act]


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    """Side of a square; ValueError for other rectangles."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"llama.cpp knows square pictures and patches, this tower has {size}")
    return int(sides.pop())


def n_used(model: PreTrainedModel) -> int:
    """Blocks of the tower up to the one that the projector reads."""
    n_layers, chosen = model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer
    if not isinstance(chosen, int):
        raise ValueError(f"vision_feature_layer {chosen} joins several layers; gguf is written for one")
    return chosen if chosen >= 0 else n_layers + 1 + chosen


def alternate_halves(pieces: list[Piece], head_dim: int) -> list[Piece]:
    """Rows of q and k as llama.cpp rotates them."""
    return [
        Piece(p.name, p.path, p.module, interleaved_halves(p.module.out_features, head_dim))  # pyright: ignore
        if p.name.endswith((".attn_q", ".attn_k"))
        else p
        for p in pieces
    ]
