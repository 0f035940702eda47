"""Saliencies without gradients: uniform weights, the norm of the inputs, the redundancy of the image tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from vlmq.calib.block import Block
from vlmq.calib.saliency import SaliencyContext
from vlmq.calib.saliency_tokens import finish, linear_kinds, ones
from vlmq.calib.tokens import IMAGE, PADDING
from vlmq.calib.walk import calls_in_order, layer_inputs

N_REFERENCES = 2048


def uniform(block: Block, context: SaliencyContext) -> dict[str, list[Tensor]]:
    """Every valid token counts the same: s = 1."""
    return finish(block, context, ones(block), saliency="uniform")


def act_norm(block: Block, context: SaliencyContext, *, exponent: float = -2.0) -> dict[str, list[Tensor]]:
    """s_n = ||x_n||^exponent, from the inputs x of each layer on the quantized path.

    At the default -2 the weighted error is the relative error of each token, which stops the few tokens with massive
    activations from owning the Hessian; a positive exponent favours them.
    """

    def scores(inputs: Tensor, kinds: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(inputs.double(), dim=-1)
        norm = torch.where((kinds != PADDING).to(norm.device), norm, 0.0)
        floor = (1e-6 * norm.amax(dim=-1, keepdim=True)).clamp(min=1e-30)
        return torch.where(norm.isfinite(), torch.maximum(norm, floor) ** exponent, torch.nan)

    return finish(block, context, _scores_of_inputs(block, scores), saliency="act_norm")


def redundancy(block: Block, context: SaliencyContext, *, tau: float = 0.1) -> dict[str, list[Tensor]]:
    """Image tokens that repeat each other count less: s_n = 1 / sum_m exp((cos(x_n, x_m) - 1) / tau).

    The sum runs over the image tokens m of the same row, n itself included, so that k copies of one token count as
    much as a single one; text and answer tokens count 1. x are the inputs of each layer on the quantized path. Beyond
    2048 image tokens in a row the sum is estimated from 2048 evenly spaced ones.
    """

    def scores(inputs: Tensor, kinds: Tensor) -> Tensor:
        made = torch.ones(kinds.shape, dtype=torch.float32, device=inputs.device)
        for row in range(kinds.shape[0]):
            members = (kinds[row] == IMAGE).nonzero().flatten().to(inputs.device)
            if len(members) > 0:
                made[row, members] = 1 / _crowd(inputs[row, members].float(), tau)
        return made

    return finish(block, context, _scores_of_inputs(block, scores), saliency="redundancy", clip=1.0)


def _crowd(tokens: Tensor, tau: float) -> Tensor:
    """1 + sum_{m != n} exp((cos(x_n, x_m) - 1) / tau) for each of (n_tokens, in_features); NaN passes on."""
    n_tokens = len(tokens)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    everyone = torch.arange(n_tokens, device=tokens.device)
    references = everyone
    if n_tokens > N_REFERENCES:
        references = torch.arange(N_REFERENCES, device=tokens.device) * n_tokens // N_REFERENCES
    crowds = []
    for part in everyone.split(N_REFERENCES):
        closeness = ((unit[part] @ unit[references].T - 1) / tau).exp()
        is_other = part[:, None] != references
        n_others = is_other.sum(dim=1).clamp(min=1)
        crowds.append(1 + (closeness * is_other).sum(dim=1) * (n_tokens - 1) / n_others)
    return torch.cat(crowds)


def _scores_of_inputs(block: Block, scores: Callable[[Tensor, Tensor], Tensor]) -> dict[str, list[Tensor]]:
    """Apply `scores(inputs (rows, n_tokens, in_features), kinds (rows, n_tokens))` to the inputs of each layer.

    Layers that share their input share their scores. One batch of inputs is on the device at a time.
    """
    groups = calls_in_order(block)
    raw: dict[str, list[Tensor]] = {name: [] for name in block.linears()}
    leaders = [group[0] for group in groups]
    for i, inputs in enumerate(layer_inputs(block, leaders)):
        for group in groups:
            x = inputs[group[0]]  # (n_tokens, in_features)
            kinds = linear_kinds(block, i, len(x))
            made = torch.zeros(0)
            if len(x) > 0:
                made = scores(x.reshape(*kinds.shape, x.shape[-1]), kinds).flatten().cpu()
            for name in group:
                raw[name].append(made)
    return raw
