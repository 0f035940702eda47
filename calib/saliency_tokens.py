"""What the saliencies need to know of a block: which tokens its linear layers see, and how scores become weights.

A linear layer of a block usually sees the block's own tokens, in the block's order, so that the kinds of the tokens
apply to it. Others see fewer or merged tokens (experts, patch mergers): for these only the number of tokens is known,
and every token is valid.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from vlmq.calib.block import Block
from vlmq.calib.saliency import SaliencyContext, postprocess
from vlmq.calib.tokens import IMAGE, TEXT


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Switch the gradients of all parameters off, so that a backward pass computes those of activations only."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def hooked(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_tokens(block: Block) -> dict[str, list[int]]:
    """How many tokens each linear layer sees in each call of the block, found by running it.

    If every layer sees all of the block's tokens in the first call, the other calls are not run; a block with experts,
    to which tokens are sent by their content, is run on all of them.
    """
    block_tokens = [kinds.numel() for kinds in block.batches]
    counts: dict[str, list[int]] = {name: [0] * len(block_tokens) for name in block.linears()}

    def count(name: str, i: int) -> Callable[[nn.Module, tuple], None]:
        def hook(layer: nn.Module, args: tuple) -> None:
            counts[name][i] += args[0].numel() // args[0].shape[-1]

        return hook

    layers = {name: block.original.get_submodule(name) for name in counts}
    has_experts = any("expert" in name for name in counts)
    for i, call in enumerate(block.inputs):
        handles = [layer.register_forward_pre_hook(count(name, i)) for name, layer in layers.items()]
        with hooked(*handles), torch.no_grad():
            block.run(call, original=True)
        if i == 0 and not has_experts and all(seen[0] == block_tokens[0] for seen in counts.values()):
            return {name: list(block_tokens) for name in counts}
    return counts


def linear_kinds(block: Block, i: int, n_tokens: int) -> Tensor:
    """The kinds (rows, tokens of a row) of the tokens that a linear layer sees in call i of the block.

    Where they are unknown all are valid: image tokens in the vision tower and the projector, text tokens elsewhere.
    """
    kinds = block.batches[i]
    if kinds.numel() == n_tokens:
        return torch.atleast_2d(kinds)
    is_visual = block.spec.part in ("vision", "projector")
    rows = kinds.shape[0] if is_visual and n_tokens % kinds.shape[0] == 0 else 1
    return torch.full((rows, n_tokens // rows), IMAGE if is_visual else TEXT, dtype=torch.int8)


def finish(
    block: Block, context: SaliencyContext, raw: dict[str, list[Tensor]], *, saliency: str, clip: float = 0.99
) -> dict[str, list[Tensor]]:
    """Post-process the raw scores of each layer and call.

    Args:
        block: the block.
        context: its `post` is applied.
        raw: per linear layer, per call, (n_tokens,) scores >= 0; layers may share tensors.
        saliency: its name, for messages.
        clip: used where the context leaves the choice to the saliency.

    Returns:
        Per linear layer, per call, (n_tokens,) float32 weights in CPU memory; shared where `raw` is.
    """
    options = asdict(context.post)
    options["clip"] = clip if context.post.clip is None else context.post.clip
    weights: dict[str, list[Tensor]] = {}
    made: dict[tuple[int, int], Tensor] = {}
    for name, calls in raw.items():
        weights[name] = []
        for i, scores in enumerate(calls):
            key = (i, id(scores))
            if key not in made:
                kinds = linear_kinds(block, i, scores.numel())
                where = (
                    f"saliency {saliency!r}, layer {block.spec.name}.{name}, batch {block.batch_indices[i]}"
                )
                made[key] = postprocess(
                    scores.cpu().reshape(kinds.shape), kinds, **options, where=where
                ).flatten()
            weights[name].append(made[key])
    return weights


def ones(block: Block) -> dict[str, list[Tensor]]:
    """Score 1 for every token of every linear layer; layers with equally many tokens share their tensors."""
    shared: dict[tuple[int, int], Tensor] = {}
    return {
        name: [shared.setdefault((i, n_tokens), torch.ones(n_tokens)) for i, n_tokens in enumerate(counts)]
        for name, counts in count_tokens(block).items()
    }
