"""Second moments of a layer's inputs, weighted by token: all that a solver needs to know of the calibration data.

With U the inputs on the quantized path and F those on the full-precision path, both (in_features, n_tokens),
and S = diag(s) the token weights,

    H = U S U^T / sum(s),      D = (F - U) S U^T / sum(s)

H is the hessian of the reconstruction error; alpha W D H^-1 shifts its target (`vlmq.linalg.shift_target`).
Padding has weight 0 and never counts. Of H only the upper triangle is summed, in tiles, which is little more
than half of the work. Sums run in float32; where inputs are bfloat16, the products of their values are exact
in float32, so the factors are multiplied in bfloat16 precision, which is faster and loses nothing but the
rounding of weighted factors and differences.

Memory on the device: 4 in_features^2 bytes for H and as much for D, for each group of layers that share
inputs and weights; one call's inputs in its own dtype on each path, and 12 in_features CHUNK_TOKENS bytes for
the chunk at work.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.calib.block import Block
from vlmq.calib.layer_inputs import layer_inputs
from vlmq.calib.tokens import PADDING

CHUNK_TOKENS = 4096
TILE_FEATURES = 256


@dataclass(frozen=True)
class Statistics:
    """What was gathered for one layer, or for several with the same inputs and token weights.

    Attributes:
        H: (in_features, in_features) float32, symmetric.
        D: (in_features, in_features) float32; None if it was not asked for, or if the two paths sent
            different numbers of tokens to the layer (an expert).
        n_tokens: tokens of weight above 0.
        n_effective: (sum s)^2 / sum s^2, what they are worth in equally weighted tokens.
    """

    H: Tensor
    D: Tensor | None
    n_tokens: int
    n_effective: float


def collect_statistics(
    block: Block,
    names: Collection[str],
    token_weights: dict[str, list[Tensor]] | None = None,
    *,
    with_shift: bool = False,
    source: Iterable[dict[str, Tensor]] | None = None,
) -> dict[str, Statistics]:
    """Gather H, and D if `with_shift`, for layers of one block as it is now.

    Args:
        block: the block; layers before the named ones may already be quantized.
        names: paths of linear layers in the block. Each call of the block runs as far as the last of them, so
            name layers of one group of `calls_in_order` at a time.
        token_weights: per name and call of the block (n_tokens,) >= 0, the coefficients s of the squared
            errors; None weighs all tokens but padding equally.
        with_shift: also run the full-precision path and gather D.
        source: the inputs of the layers by name, one entry per call of the block; None runs the block for them.

    Returns:
        Statistics by name; layers with the same inputs and weights share one object.

    Raises:
        RuntimeError: an input is not finite, or no token of weight above 0 reached a layer.
        ValueError: the weights of a layer do not fit the tokens that it sees.
    """
    names = list(names)
    weights = {name: None if token_weights is None else token_weights[name] for name in names}
    groups = _by_weights(block, names, weights)
    originals: Iterator[dict[str, Tensor] | None] = (
        layer_inputs(block, names, path="original") if with_shift else iter([None] * len(block.inputs))
    )
    for i, (inputs, original) in enumerate(zip(source or layer_inputs(block, names), originals, strict=True)):
        groups = [part for group in groups for part in group.split(inputs)]
        for group in groups:
            name = group.names[0]
            where = f"block {block.spec.name!r}, layer {name!r}, batch {block.batch_indices[i]}"
            s = _weights_of_call(block.batches[i], weights[name], i, inputs[name], where)
            group.add(inputs[name], s, None if original is None else original[name], where)
    return {name: statistics for group in groups for name, statistics in group.finish(block).items()}


def sum_rows(
    rows: Iterable[tuple[Tensor, Tensor, Tensor | None]], in_features: int, where: str
) -> Statistics | None:
    """Gather H and D of one layer from its inputs themselves.

    Args:
        rows: inputs on the quantized path (n_tokens, in_features), weights of the tokens (n_tokens,) >= 0, inputs
            of the same tokens on the full-precision path, or None for no D.
        in_features: inputs of the layer.
        where: what they belong to, for the message.

    Returns:
        the statistics; None if no token has a weight above 0.

    Raises:
        RuntimeError: an input is not finite.
    """
    sums: _Sums | None = None
    for u, s, f in rows:
        if sums is None:
            sums = _Sums([where], torch.zeros(in_features, in_features, device=u.device))
        sums.add(u, s, f, where)
    return sums.result() if sums is not None and sums.n_tokens else None


def _by_weights(block: Block, names: list[str], weights: dict[str, list[Tensor] | None]) -> list["_Sums"]:
    """One group for each list of weights among layers of equal width."""
    groups: list[_Sums] = []
    for name in names:
        given = weights[name]
        if given is not None and len(given) != len(block.inputs):
            raise ValueError(
                f"block {block.spec.name!r}, layer {name!r}: expected token weights for each of "
                f"{len(block.inputs)} calls, got {len(given)}"
            )
        in_features = int(block.original.get_submodule(name).in_features)  # type: ignore[arg-type]
        for group in groups:
            if len(group.H) == in_features and _is_same_weighting(weights[group.names[0]], given):
                group.names.append(name)
                break
        else:
            groups.append(_Sums([name], torch.zeros(in_features, in_features, device=block.device)))
    return groups


def _is_same_weighting(a: list[Tensor] | None, b: list[Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _weights_of_call(
    kinds: Tensor, weights: list[Tensor] | None, i: int, inputs: Tensor, where: str
) -> Tensor | None:
    """Weights of one call's tokens, (n_tokens,) float32, 0 for padding; None if all are 1.

    Padding is known for layers that receive the block's own tokens; a layer with another number of tokens (an
    expert, padded windows) counts all that it receives.
    """
    kinds = kinds.flatten().to(inputs.device)
    has_padding = len(kinds) == len(inputs) and bool((kinds == PADDING).any())
    if weights is None:
        return (kinds != PADDING).float() if has_padding else None
    s = weights[i].to(inputs.device, torch.float32).flatten()
    if len(s) != len(inputs):
        raise ValueError(f"{where}: expected {len(inputs)} token weights, got {len(s)}")
    if not bool(((s >= 0) & s.isfinite()).all()):
        raise ValueError(f"{where}: expected finite token weights >= 0, got minimum {float(s.min()):g}")
    return s * (kinds != PADDING) if has_padding else s


@dataclass
class _Sums:
    """Running sums of layers that have received the same inputs so far."""

    names: list[str]
    H: Tensor
    D: Tensor | None = None
    is_shift_known: bool = True
    n_tokens: int = 0
    total: float = 0.0
    squares: float = 0.0

    def split(self, inputs: dict[str, Tensor]) -> list["_Sums"]:
        """One group for each different input among the layers; what was summed so far is copied."""
        members: dict[int, list[str]] = {}
        for name in self.names:
            members.setdefault(id(inputs[name]), []).append(name)
        self.names, *others = members.values()
        D = self.D
        return [self] + [
            _Sums(
                names,
                self.H.clone(),
                None if D is None else D.clone(),
                self.is_shift_known,
                self.n_tokens,
                self.total,
                self.squares,
            )
            for names in others
        ]

    def add(self, u: Tensor, s: Tensor | None, f: Tensor | None, where: str) -> None:
        """Add one call: u and f (n_tokens, in_features), s (n_tokens,)."""
        self.is_shift_known &= f is not None and f.shape == u.shape
        if s is not None and not bool(s.all()):
            is_counted = s > 0
            u, s = u[is_counted], s[is_counted]
            f = f[is_counted] if f is not None and self.is_shift_known else None
        if len(u) == 0:
            return
        if self.is_shift_known and self.D is None:
            self.D = torch.zeros_like(self.H)
        with exact_products(u.dtype):
            for start in range(0, len(u), CHUNK_TOKENS):
                chunk = slice(start, start + CHUNK_TOKENS)
                root = None if s is None else s[chunk, None].sqrt()
                x = u[chunk].float()
                shift = f[chunk].float() - x if f is not None and self.is_shift_known else None
                if root is not None:
                    x = x * root
                    shift = None if shift is None else shift * root
                _add_gram(self.H, x)
                if self.D is not None and shift is not None and bool(shift.any()):
                    self.D.addmm_(shift.T, x)
        self.n_tokens += len(u)
        self.total += len(u) if s is None else float(s.sum(dtype=torch.float64))
        self.squares += len(u) if s is None else float(s.double().square().sum())
        sums = [self.H] if self.D is None else [self.H, self.D]
        if not all(bool(gram.diagonal().isfinite().all()) for gram in sums):
            raise RuntimeError(
                f"{where}: the inputs hold NaN or infinite values; look for them in the calibration row or in the "
                "model's weights, or compute in bfloat16 or float32"
            )

    def finish(self, block: Block) -> dict[str, Statistics]:
        """The statistics by name."""
        if self.n_tokens == 0:
            raise RuntimeError(
                f"block {block.spec.name!r}: no calibration token reached {', '.join(self.names)}; add calibration "
                "rows that use it, or keep it in full precision with an override of None"
            )
        return dict.fromkeys(self.names, self.result())

    def result(self) -> Statistics:
        """The sums, normalised in place."""
        _mirror(self.H)
        self.H /= self.total
        D = self.D.div_(self.total) if self.D is not None and self.is_shift_known else None
        return Statistics(self.H, D, self.n_tokens, self.total**2 / self.squares)


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x to the upper triangle of `gram`."""
    for start in range(0, len(gram), TILE_FEATURES):
        gram[start : start + TILE_FEATURES, start:].addmm_(
            x[:, start : start + TILE_FEATURES].T, x[:, start:]
        )


def _mirror(gram: Tensor) -> None:
    """Copy the upper triangle to the lower one."""
    for start in range(0, len(gram), TILE_FEATURES):
        end = min(start + TILE_FEATURES, len(gram))
        corner = gram[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[end:, start:end] = gram[start:end, end:].T


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of bfloat16 values be formed in bfloat16 precision, in which they are exact."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
