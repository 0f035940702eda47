"""Second moments of a layer's inputs, weighted by token: all that a solver needs to know of the calibration data.

With U the inputs on the quantized path and F those on the full-precision path, both (in_features, n_tokens), and
S = diag(s) the token weights,

    H = U S U^T / sum(s),      D = (F - U) S U^T / sum(s)

H is the hessian of the reconstruction error; alpha W D H^-1 shifts its target (`vlmq.linalg.shift_target`). Padding
has weight 0 and never counts. Sums run in float32; where inputs are bfloat16, the products of their values are exact
in float32, so the factors are multiplied in bfloat16 precision, which is faster and loses nothing but the rounding of
the weighted factor.

Memory on the device: (1 or 2) in_features^2 float32 for each group of layers that share inputs and weights, and one
call's inputs twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.calib.block import Block
from vlmq.calib.layer_inputs import layer_inputs
from vlmq.calib.tokens import PADDING


@dataclass(frozen=True)
class Statistics:
    """What was gathered for one layer, or for several with the same inputs and token weights.

    `H`: (in_features, in_features) float32. `D`: the same shape, None if not asked for. `n_tokens`: tokens of weight
    above 0. `n_effective`: (sum s)^2 / sum s^2, what they are worth in equally weighted tokens.
    """

    H: Tensor
    D: Tensor | None
    n_tokens: int
    n_effective: float


@dataclass
class _Sums:
    """Running sums of one group of layers."""

    weights: list[Tensor] | None
    H: Tensor | None = None
    D: Tensor | None = None
    total: float = 0.0
    square: float = 0.0
    n_tokens: int = 0


def collect_statistics(
    block: Block,
    names: list[str],
    token_weights: dict[str, list[Tensor]] | None = None,
    *,
    with_shift: bool,
) -> dict[str, Statistics]:
    """Gather H, and D if `with_shift`, for layers of one block as it is now.

    Args:
        block: the block; layers before the named ones may already be quantized.
        names: paths of linear layers in the block that share their input.
        token_weights: per name, per call of the block, (n_tokens,) >= 0; None weighs all tokens but padding equally.
        with_shift: also run the full-precision path and gather D.

    Returns:
        Statistics by name; layers with the same weights share one object.

    Raises:
        RuntimeError: an input is not finite, or no token of weight above 0 reached a layer.
        ValueError: the weights of a layer do not fit the tokens that it sees.
    """
    groups: list[tuple[list[str], _Sums]] = []
    for name in names:
        weights = None if token_weights is None else token_weights[name]
        for members, sums in groups:
            if _same_weights(sums.weights, weights):
                members.append(name)
                break
        else:
            groups.append(([name], _Sums(weights)))
    originals: Iterator[dict[str, Tensor] | None] = (
        layer_inputs(block, names, path="original") if with_shift else iter([None] * len(block.inputs))
    )
    for i, (inputs, original) in enumerate(zip(layer_inputs(block, names), originals, strict=True)):
        for members, sums in groups:
            u = inputs[members[0]]
            where = f"block {block.spec.name!r}, layer {members[0]!r}, batch {block.batch_indices[i]}"
            _add(
                sums,
                u,
                None if original is None else original[members[0]],
                _weights(block, sums, i, u, where),
                where,
            )
    finished = [(members, _finish(block, members, sums)) for members, sums in groups]
    return {name: statistics for members, statistics in finished for name in members}


def _add(sums: _Sums, u: Tensor, f: Tensor | None, s: Tensor, where: str) -> None:
    """Add one call's tokens to the sums."""
    if len(u) == 0:
        return
    if not torch.isfinite(u).all():
        raise RuntimeError(
            f"{where}: the inputs hold NaN or infinite values; look for them in the calibration row or in the model's "
            "weights, or compute in bfloat16 or float32"
        )
    root = s.sqrt()[:, None]
    is_uniform = bool((s == 1).all())
    weighted = u if is_uniform else (u.float() * root).to(u.dtype)
    if sums.H is None:
        sums.H = torch.zeros(u.shape[1], u.shape[1], device=u.device)
    with _exact_products(u.dtype):
        sums.H.addmm_(weighted.float().T, weighted.float())
        if f is not None:
            if f.shape != u.shape:
                raise RuntimeError(f"{where}: the two paths see {len(f)} and {len(u)} tokens; use alpha = 0")
            if sums.D is None:
                sums.D = torch.zeros_like(sums.H)
            if f is not u:
                difference = (f.float() - u.float()) * root
                sums.D.addmm_(difference.T, weighted.float())
    sums.total += float(s.sum())
    sums.square += float(s.square().sum())
    sums.n_tokens += int((s > 0).sum())


def _weights(block: Block, sums: _Sums, i: int, u: Tensor, where: str) -> Tensor:
    """The weights of one call's tokens, (n_tokens,) float32; padding is 0."""
    kinds = block.batches[i].flatten()
    valid = (kinds != PADDING).float() if len(kinds) == len(u) else torch.ones(len(u))
    if sums.weights is None:
        return valid.to(u.device)
    given = sums.weights[i].float()
    if len(given) != len(u):
        raise ValueError(f"{where}: expected {len(u)} token weights, got {len(given)}")
    return (given.cpu() * valid).to(u.device)


def _finish(block: Block, members: list[str], sums: _Sums) -> Statistics:
    if sums.H is None or sums.total <= 0:
        raise RuntimeError(
            f"block {block.spec.name!r}: no calibration token reached {', '.join(members)}; add calibration rows that "
            "use it, or keep it in full precision with an override of None"
        )
    D = None if sums.D is None else sums.D / sums.total
    return Statistics(sums.H / sums.total, D, sums.n_tokens, sums.total**2 / sums.square)


def _same_weights(a: list[Tensor] | None, b: list[Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (
        len(a) == len(b) and all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))
    )


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of bfloat16 values be formed in bfloat16 precision, in which they are exact."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
