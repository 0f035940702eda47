"""The order in which a model runs its blocks, and which stored outputs each of them reads.

One forward of a batch is run with every block and tower wrapped. A block computes without gradients and
returns a fresh leaf of the autograd graph; all that the model does in between is recorded by autograd. So the
graph behind the arguments of a block names the outputs that it is made of (the block before it, the third
vision block through a deepstack merger), and an output is dropped as soon as the last of its readers is done.
Nothing is differentiated.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmq.calib.forwards import patched, repeat_writes, run_with_writes
from vlmq.calib.trees import leaves, map_leaves
from vlmq.families import BlockSpec


@dataclass
class Trace:
    """What forwards of a model did.

    Attributes:
        order: blocks and towers; a block stands where it first began, a tower where it first ended.
        n_calls: per kind of batch (`signature`), how often each block and tower ran.
        readers: (name, number of the output tensor) -> blocks and towers whose input is made of it.
    """

    order: list[str] = field(default_factory=list)
    n_calls: dict[tuple[str, ...], dict[str, int]] = field(default_factory=dict)
    readers: dict[tuple[str, int], set[str]] = field(default_factory=dict)


def signature(inputs: dict[str, Any]) -> tuple[str, ...]:
    """The kind of a batch: the names of its inputs. Batches of one kind run the same modules."""
    return tuple(sorted(name for name, value in inputs.items() if value is not None))


def trace(
    forward: Callable[[int], None],
    signatures: list[tuple[str, ...]],
    blocks: dict[str, nn.Module],
    towers: dict[str, nn.Module],
) -> Trace:
    """Trace the first batch of each kind.

    Args:
        forward: runs the model on the batch of that index.
        signatures: the kind of each batch.
        blocks: the blocks that will be walked.
        towers: modules around blocks, whose output is stored once their blocks are done.
    """
    result = Trace()
    for index, kind in enumerate(signatures):
        if kind in result.n_calls:
            continue
        recorder = _Recorder(result.readers)
        wrapped = {module: recorder.block(name, module.forward) for name, module in blocks.items()}
        for name, module in towers.items():
            has_blocks = any(block.startswith(f"{name}.") for block in blocks)
            wrapped[module] = recorder.tower(name, module.forward, live=has_blocks)
        with patched(wrapped), torch.enable_grad():
            forward(index)
        result.n_calls[kind] = {name: recorder.order.count(name) for name in set(recorder.order)}
        _merge(result.order, list(dict.fromkeys(recorder.order)))
    return result


def _merge(order: list[str], seen: list[str]) -> None:
    """Put the names that `order` lacks before the next name that it has."""
    for i, name in enumerate(seen):
        if name not in order:
            following = next((n for n in seen[i + 1 :] if n in order), None)
            order.insert(len(order) if following is None else order.index(following), name)


class _Recorder:
    """Wraps forwards, and keeps the leaves that they return together with who made them."""

    def __init__(self, readers: dict[tuple[str, int], set[str]]) -> None:
        self.order: list[str] = []
        self.readers = readers
        self._makers: dict[Tensor, tuple[str, int]] = {}

    def block(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.order.append(name)
            self._read((args, kwargs), name)
            with torch.no_grad():
                made = run_with_writes(forward, args, kwargs)
            output, written = self._made(made, name)
            repeat_writes(written, args, kwargs)
            return output

        return call

    def tower(self, name: str, forward: Callable[..., Any], *, live: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(live):
                made = run_with_writes(forward, args, kwargs)
            self.order.append(name)
            self._read(made, name)
            output, written = self._made(made, name)
            repeat_writes(written, args, kwargs)
            return output

        return call

    def _made(self, output: Any, name: str) -> Any:
        numbers = iter(range(10**6))

        def fresh(tensor: Tensor) -> Tensor:
            number = next(numbers)
            if not tensor.is_floating_point():
                return tensor
            leaf = tensor.detach().clone().requires_grad_()
            self._makers[leaf] = (name, number)
            return leaf.clone()

        return map_leaves(fresh, output)

    def _read(self, tree: Any, reader: str) -> None:
        for maker in self._makers_behind(tree):
            self.readers.setdefault(maker, set()).add(reader)

    def _makers_behind(self, tree: Any) -> Iterator[tuple[str, int]]:
        stack = [t.grad_fn for t in leaves(tree) if t.grad_fn is not None]
        seen = set(stack)
        while stack:
            node = stack.pop()
            maker = self._makers.get(getattr(node, "variable", None))  # type: ignore[arg-type]
            if maker is not None:
                yield maker
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)


def walk_order(order: list[str], blocks: dict[str, BlockSpec]) -> list[str]:
    """The steps of the walk: blocks, and each tower that ends before a block outside it begins."""
    steps = []
    for i, name in enumerate(order):
        later = [n for n in order[i + 1 :] if n in blocks]
        if name in blocks or any(not n.startswith(f"{name}.") for n in later):
            steps.append(name)
    return steps
