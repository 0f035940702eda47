"""One block on its way through calibration: its module, a full-precision copy, the inputs of both paths."""

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmq.calib.settled import Settled, replayed
from vlmq.calib.trees import load
from vlmq.families import BlockSpec
from vlmq.families.experts import UnfusedExperts


@dataclass
class BlockCall:
    """The arguments of one call of a block; its tensors lie in CPU memory."""

    args: tuple
    kwargs: dict[str, Any]


@dataclass
class Block:
    """A block with what went into it.

    The lists hold one entry per batch that reaches the block, or one per call where a forward runs it several
    times (shared layers, a tower that sees images and then videos).

    Attributes:
        spec: path in the model and part.
        module: the live block in the model; the consumer replaces its linear layers in place.
        original: a full-precision copy of it, with the same parameters, which are not written to.
        inputs: calls of the quantized path, all blocks before this one being quantized.
        original_inputs: calls of the full-precision path; entry i is the same object as `inputs[i]` as long
            as both paths are equal.
        original_outputs: hidden states (rows, n_tokens, features) that the full-precision block makes of
            them.
        batches: kinds of the tokens of the hidden states, (rows, n_tokens) int8 per call.
        batch_indices: the number of the batch that each call belongs to.
        device: where the block runs.
        layer_groups: filled by `calls_in_order`: layers that share an input, in the order of calls.
        layer_calls: filled by `calls_in_order`: how often one forward calls each layer.
        settled: what is final in the block, see `vlmq.calib.settled`.
    """

    spec: BlockSpec
    module: nn.Module
    original: nn.Module
    inputs: list[BlockCall]
    original_inputs: list[BlockCall]
    original_outputs: list[Tensor]
    batches: list[Tensor]
    batch_indices: list[int]
    device: torch.device
    layer_groups: list[list[str]] = field(default_factory=list, repr=False)
    layer_calls: dict[str, int] = field(default_factory=dict, repr=False)
    settled: Settled = field(default_factory=Settled, repr=False)

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers of the live block by their path in it.

        Subclasses of nn.Linear are left out, and so are the layers of unfused experts: which tokens they see changes
        while the block is worked on, see `experts`.
        """
        inside = tuple(f"{path}." for path in self.experts())
        named = self.module.named_modules()
        return {name: m for name, m in named if type(m) is nn.Linear and not name.startswith(inside)}

    def experts(self) -> dict[str, UnfusedExperts]:
        """The unfused experts of the live block by their path in it."""
        return {name: m for name, m in self.module.named_modules() if isinstance(m, UnfusedExperts)}

    def run(self, call: BlockCall, *, original: bool = False) -> Any:
        """What the block, or its full-precision copy, returns; the stored arguments are not written to."""
        module = self.original if original else self.module
        return run_call(module, call, self.device)

    def settle(self, names: Collection[str]) -> None:
        """Say that these linear layers of the live block stay as they now are."""
        self.settled.layers.update(names)

    def unsettle(self) -> None:
        """Say that layers of the live block that were settled have changed: what was kept of its runs is dropped."""
        self.settled.forget_live()

    def replaying(
        self, i: int, *, original: bool, reach: Collection[str] = ()
    ) -> AbstractContextManager[None]:
        """While it lasts, one forward of call `i` on one path takes what is final from memory.

        Args:
            i: index into `inputs`.
            original: for the full-precision copy on `original_inputs[i]`, else for the live block.
            reach: modules whose hooks have to run or whose inputs are wanted; what holds one is not replayed.
        """
        module = self.original if original else self.module
        return replayed(self.settled, module, i, original=original, reach=reach, device=self.device)


def run_call(module: nn.Module, call: BlockCall, device: torch.device) -> Any:
    """Call `module` on `device` with copies of the arguments of `call`."""
    return module(*load(call.args, device), **load(call.kwargs, device))


def hidden_states(call: BlockCall) -> Tensor | None:
    """The argument that holds the hidden states, (rows, n_tokens, features) or (n_tokens, features)."""
    candidates = (*call.args[:1], call.kwargs.get("hidden_states"), *call.args[1:], *call.kwargs.values())
    return next(
        (c for c in candidates if isinstance(c, Tensor) and c.is_floating_point() and c.ndim >= 2), None
    )
