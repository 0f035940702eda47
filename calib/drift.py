"""How far the residual stream has drifted where a layer's output enters it, as a shift of the layer's target.

The output z = W u of the last linear layer of an attention or feed-forward branch is added to the residual
stream, y = r + z. On the quantized path y_U differs from the full-precision y_F through the layer's inputs
and through what all layers before have left in r. The weights that bring y_U nearest to y_F,

    min over What of ||(r_U + What U) - (r_F + W F)||^2_S,   T = W + R H^-1,   R = (y_F - y_U) S U^T / sum(s),

with y_U taken at What = W, correct both. With r_U = r_F it is the asymmetric target of GPTAQ, R = W (F - U)
S U^T.

Where z enters the stream is found in any family without its source: the input h of a module that runs later,
or the block's output, for which dh/dz is the identity and h differs from z. Branches whose output is normed or
scaled before it is added have no such point, and keep the asymmetric target.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmq.calib.block import Block, BlockCall, hidden_states, run_call
from vlmq.calib.replay import StopForward
from vlmq.calib.saliency_tokens import frozen, hooked
from vlmq.calib.statistics import exact_products
from vlmq.calib.trees import first_tensor


@dataclass(frozen=True)
class SumPoint:
    """Where a layer's output has been added: the input of module `entered`, or the block's output if None."""

    entered: str | None


def find_sum_point(block: Block, name: str) -> SumPoint | None:
    """Find where the output of linear layer `name` enters the residual stream, by one run of the block.

    Returns:
        the point, or None if the output is used in any other way than added as it is.
    """
    leaves: list[Tensor] = []
    entering: list[tuple[str, Tensor]] = []

    def cut(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        leaves.append(output.detach().clone().requires_grad_())
        return leaves[0].clone()

    def enter(key: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            h = hidden_states(BlockCall(args, kwargs))
            if leaves and h is not None:
                entering.append((key, h))

        return hook

    handles = [
        module.register_forward_pre_hook(enter(key), with_kwargs=True)
        for key, module in block.original.named_modules()
        if key
    ]
    handles.append(block.original.get_submodule(name).register_forward_hook(cut))
    with hooked(*handles), frozen(block.original), torch.enable_grad():
        output = first_tensor(block.run(block.original_inputs[0], original=True))
        x = hidden_states(block.original_inputs[0])
        if (
            len(leaves) != 1
            or x is None
            or leaves[0].numel() // leaves[0].shape[-1] != x.numel() // x.shape[-1]
        ):
            return None
        if _is_sum(output, leaves[0]):
            return SumPoint(None)
        return next((SumPoint(key) for key, h in reversed(entering) if _is_sum(h, leaves[0])), None)


class OutputShift:
    """Gathers R = (y_F - y_U) S U^T / sum(s) of a layer while its inputs are read for other statistics.

    The layer's predecessors are quantized, the layer itself is not: the live block holds its full-precision weight.

    Args:
        block: the block.
        name: path of a linear layer in the block.
        point: from `find_sum_point`.
        token_weights: per call of the block, (n_tokens,) float32, 0 for padding.
    """

    def __init__(self, block: Block, name: str, point: SumPoint, token_weights: list[Tensor]) -> None:
        self.block, self.name, self.point, self.token_weights = block, name, point, token_weights
        self._sum: Tensor | None = None
        self._total = 0.0

    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """Run the block and yield the layer's inputs, (n_tokens, in_features) by name, for each of its calls."""
        block, name, point = self.block, self.name, self.point
        for i, s in enumerate(self.token_weights):
            inputs, y_quantized = _observe(block, name, point, i, original=False)
            u = inputs[0]
            yield {name: u}
            if point.entered is None:
                y_original = block.original_outputs[i].to(block.device)
            elif block.inputs[i] is block.original_inputs[i] and block.module is block.original:
                y_original = y_quantized
            else:
                _, y_original = _observe(block, name, point, i, original=True)
            drift = y_original.flatten(0, -2).float() - y_quantized.flatten(0, -2).float()
            weighted = u.float() * s.to(u.device)[:, None]
            if self._sum is None:
                self._sum = weighted.new_zeros(drift.shape[1], u.shape[1])
            with exact_products(u.dtype):
                self._sum.addmm_(drift.T, weighted)
            self._total += float(s.sum())

    def result(self) -> Tensor:
        """R, (out_features, in_features) float32, once `inputs` has been read to its end; it is given away."""
        assert self._sum is not None
        total, self._sum = self._sum, None
        return total.div_(self._total)


def _observe(
    block: Block, name: str, point: SumPoint, i: int, *, original: bool
) -> tuple[list[Tensor], Tensor]:
    """Run one path of call `i` up to the point.

    Returns:
        the layer's inputs, (n_tokens, in_features) per call of it, none on the full-precision path; and the stream.
    """
    module, calls = (block.original, block.original_inputs) if original else (block.module, block.inputs)
    inputs: list[Tensor] = []
    stream: list[Tensor] = []
    is_past = False

    def see(_: nn.Module, args: tuple) -> None:
        nonlocal is_past
        is_past = True
        if not original:
            inputs.append(args[0].reshape(-1, args[0].shape[-1]))

    def leave(*_: Any) -> None:
        nonlocal is_past
        is_past = True

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        h = hidden_states(BlockCall(args, kwargs))
        if is_past and h is not None:
            stream.append(h)
            raise StopForward

    # A child that is replayed runs none of the hooks inside it; its own hooks run.
    child = module.get_submodule(name.split(".")[0])
    handles = [
        module.get_submodule(name).register_forward_pre_hook(see),
        child.register_forward_hook(leave),
    ]
    reach = [] if original else [name]
    if point.entered is not None:
        entered = module.get_submodule(point.entered)
        handles.append(entered.register_forward_pre_hook(enter, with_kwargs=True))
        reach.append(point.entered)
    with (
        hooked(*handles),
        torch.no_grad(),
        suppress(StopForward),
        block.replaying(i, original=original, reach=reach),
    ):
        stream.append(first_tensor(run_call(module, calls[i], block.device)))
    return inputs, stream[0]


def _is_sum(h: Tensor, z: Tensor) -> bool:
    """Whether h = z + something that does not depend on z, tried on one direction."""
    if not h.requires_grad or h.numel() != z.numel() or h.shape[-1] != z.shape[-1]:
        return False
    if torch.equal(h.detach().reshape(z.shape), z.detach()):
        return False
    direction = torch.linspace(-1, 1, h.numel(), device=h.device).cos().to(h.dtype).reshape(h.shape)
    (slope,) = torch.autograd.grad(h, z, direction, allow_unused=True, retain_graph=True)
    expected = direction.reshape(z.shape).float()
    return slope is not None and torch.allclose(slope.float(), expected, rtol=1e-3, atol=1e-5)
