"""The experts of one block: each is solved on the tokens that the router sends to it.

The tokens that enter the experts are captured once per call of the block, on the quantized path with their routing
and, where targets are shifted, on the full-precision path. Then one expert after the other: its first projection on the
tokens routed to it; its last one on what the first, now quantized, makes of them. The full-precision counterpart of a
token is what the original expert makes of the same token, whatever the original router would have chosen, so that the
two always belong together. (Llama 4 multiplies a token with its routing weight before the expert, not after: p is 1
there, and a token that the original router would not have sent is its own counterpart.)

The output of an expert enters the sum of its token with the routing weight p, so a token's error counts s p^2, with s
its weight by the saliency. An expert that no calibration token reaches is solved with H = I, that is by the distance of
the weights alone, and its report says so.

Memory: the tokens that enter the experts, on both paths, in CPU memory; on the device the H and D of one layer.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmq.block_solving import solve_together
from vlmq.calib.block import Block, run_call
from vlmq.calib.replay import StopForward
from vlmq.calib.saliency_tokens import hooked
from vlmq.calib.statistics import Statistics, sum_rows
from vlmq.calib.tokens import PADDING
from vlmq.calib.trees import offload
from vlmq.calib.walk import calls_in_order
from vlmq.families.experts import DOWN, UnfusedExperts
from vlmq.run import Run

UNSEEN = "no calibration token reached this expert: solved with equal second moments for all inputs"


@dataclass(frozen=True)
class RoutedCall:
    """What entered the experts in one call of the block, in CPU memory.

    Attributes:
        tokens: (n_tokens, in_features), quantized path.
        original: the same on the full-precision path; None if it was not asked for.
        chosen: (n_tokens, n_chosen) int64.
        weights: (n_tokens, n_chosen) float32, s p^2.
    """

    tokens: Tensor
    original: Tensor | None
    chosen: Tensor
    weights: Tensor


def quantize_experts(run: Run, block: Block, weights: dict[str, list[Tensor]]) -> None:
    """Quantize the unfused experts of a block, its other layers being quantized.

    Args:
        run: the call of `quantize`.
        block: the block.
        weights: per layer and call of the block, (n_tokens,) float32, from a saliency.
    """
    for path, experts in block.experts().items():
        calls = _capture(run, block, path, weights)
        original: Any = block.original.get_submodule(path)
        for number in range(experts.n_experts):
            for projection in (experts.up, DOWN):
                _solve_layer(run, block, path, (number, projection), calls, original)
        block.settle([f"{path}.{name}" for name in experts.layer_names()])


def _solve_layer(
    run: Run,
    block: Block,
    path: str,
    layer: tuple[int, str],
    calls: list[RoutedCall],
    original: UnfusedExperts,
) -> None:
    """Solve one projection of one expert; of the last one, the first is quantized already."""
    number, projection = layer
    live: Any = block.module.get_submodule(path)
    name, is_last = f"{path}.{number}.{projection}", projection == DOWN

    def rows() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for call in calls:
            token, place = (call.chosen == number).nonzero(as_tuple=True)
            if len(token):
                u = call.tokens[token].to(block.device)
                f = None if call.original is None else call.original[token].to(block.device)
                if is_last:
                    u = live.inner(number, u)
                    f = None if f is None else original.inner(number, f)
                yield u, call.weights[token, place].to(block.device), f

    in_features = int(live.layer(number, projection).in_features)
    found = sum_rows(rows(), in_features, f"block {block.spec.name!r}, layer {name!r}")
    notes: tuple[str, ...] = ()
    if found is None:
        found = Statistics(torch.eye(in_features, device=block.device), None, 0, 0.0)
        notes = (UNSEEN,)
    solve_together(run, f"{block.spec.name}.", [name], found, notes=notes)


def _capture(run: Run, block: Block, path: str, weights: dict[str, list[Tensor]]) -> list[RoutedCall]:
    """Run the block as far as its experts, once per call and path."""
    captured = []
    n_copies = block.experts()[path].n_copies
    for i in range(len(block.inputs)):
        tokens, chosen, p = _entering(block, path, i, original=False)
        original = None
        if run.alpha > 0:
            original, chosen_before, _ = _entering(block, path, i, original=True)
            is_same_shape = original.shape == tokens.shape
            was_chosen = (chosen_before >= 0).any(dim=1, keepdim=True)
            original = torch.where(was_chosen, original, tokens) if is_same_shape else None
        s = _token_weights(block, i, len(tokens) // n_copies, weights).repeat(n_copies)
        captured.append(RoutedCall(tokens, original, chosen, s[:, None] * p.float().square()))
    return captured


def _entering(block: Block, path: str, i: int, *, original: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the experts in call `i`: tokens, chosen experts, their weights."""
    module, calls = (block.original, block.original_inputs) if original else (block.module, block.inputs)
    seen: list[Any] = []

    def take(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(offload((*args, *kwargs.values())))
        raise StopForward

    experts: Any = module.get_submodule(path)
    handle = experts.register_forward_pre_hook(take, with_kwargs=True)
    with (
        hooked(handle),
        torch.no_grad(),
        suppress(StopForward),
        block.replaying(i, original=original, reach=[path]),
    ):
        run_call(module, calls[i], block.device)
    if not seen:
        raise RuntimeError(
            f"block {block.spec.name!r}: call {i} does not reach its experts {path!r}; keep them in full precision "
            f"with an override of None to '{block.spec.name}.{path}.*'"
        )
    return experts.routed(*seen[0])


def _token_weights(block: Block, i: int, n_tokens: int, weights: dict[str, list[Tensor]]) -> Tensor:
    """Weights (n_tokens,) of the tokens that enter the experts, 0 for padding.

    Those of the last layer before them that sees each token; all alike where no layer does.
    """
    kinds = block.batches[i].flatten()
    valid = (kinds != PADDING).float() if len(kinds) == n_tokens else torch.ones(n_tokens)
    order = [name for group in reversed(calls_in_order(block)) for name in group if name in weights]
    return next((weights[n][i] for n in order if weights[n][i].numel() == n_tokens), valid).float() * valid
