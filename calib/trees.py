"""Tensors inside the arguments and outputs of a module: tuples, lists, dicts and model outputs of them.

Containers are rebuilt at every map, so what a model writes into an output object never reaches the stored
one.
"""

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OFFLOAD = torch.device("cpu")


@dataclass(frozen=True)
class Dropped:
    """Stands for a stored tensor that no later block reads."""

    shape: torch.Size
    dtype: torch.dtype


def leaves(tree: Any) -> Iterator[Any]:
    """The tensors (and `Dropped`) of a tree in a fixed order."""
    if isinstance(tree, Tensor | Dropped):
        yield tree
    elif isinstance(tree, MutableMapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from leaves(value)


def map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with every tensor (and `Dropped`) replaced by `change` of it, in the order of `leaves`."""
    if isinstance(tree, Tensor | Dropped):
        return change(tree)
    if isinstance(tree, MutableMapping):
        made = copy.copy(tree)
        for key, value in tree.items():
            made[key] = map_leaves(change, value)
        return made
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(change, value) for value in tree))
    if type(tree) in (tuple, list):
        return type(tree)(map_leaves(change, value) for value in tree)
    return tree


def first_tensor(tree: Any) -> Tensor:
    """The first tensor of a tree: by the habit of all families the hidden states.

    Raises:
        TypeError: there is none.
    """
    for leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            return leaf
    raise TypeError(
        f"expected a block that returns a tensor or a tuple of tensors, got {type(tree).__name__}"
    )


def offload(tree: Any) -> Any:
    """A copy with its tensors in CPU memory."""
    return map_leaves(lambda t: t.detach().to(OFFLOAD, copy=True) if isinstance(t, Tensor) else t, tree)


def load(tree: Any, device: torch.device) -> Any:
    """A copy with its tensors on `device`, which the receiver may write to."""
    return map_leaves(lambda t: t.to(device, copy=True), tree)


def share(tree: Any, other: Any) -> Any:
    """`other` if every tensor of `tree` equals its; else `tree` with the equal ones taken from `other`."""
    mine, theirs = list(leaves(tree)), list(leaves(other))
    if len(mine) != len(theirs):
        return tree
    same = [_equal(a, b) for a, b in zip(mine, theirs, strict=True)]
    if all(same):
        return other
    merged = iter(b if is_same else a for a, b, is_same in zip(mine, theirs, same, strict=True))
    return map_leaves(lambda _: next(merged), tree)


def known_leaves(tree: Any, known: Sequence[Tensor | Dropped]) -> Any:
    """The tree with each tensor that equals one of `known` replaced by that one."""
    return map_leaves(lambda leaf: next((other for other in known if _equal(leaf, other)), leaf), tree)


def _equal(a: Tensor | Dropped, b: Tensor | Dropped) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, Dropped) and isinstance(b, Dropped) and a == b
    return a is b or (a.dtype == b.dtype and bool(torch.equal(a, b)))
