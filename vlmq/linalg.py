"""Linear algebra of the quantization objective; knows no layer and no model.

Every solver minimises, over weights What on a grid,

    L(What) = tr[(What - T) H (What - T)^T],      H = U S U^T / sum(s) + lambda mean(diag H) I

with T the target of (out_features, in_features) and H the weighted second moment of the inputs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

DAMP = 0.01
DAMP_RETRIES = 6
SLICE_COLUMNS = 512


@dataclass(frozen=True)
class Damping:
    """The diagonal (in_features,) that makes a hessian positive definite, and the damping that it has."""

    diagonal: Tensor
    damp: float
    n_retries: int


def find_damping(hessian: Tensor, damp: float = DAMP) -> Damping:
    """Add `damp` times the mean diagonal to the hessian, and see whether its inverse can be factored.

    The damping is raised tenfold, at most DAMP_RETRIES times, while the Cholesky factorisation fails; the
    damping that was used is returned, so that it can be reported. Inputs that are always zero get the mean
    diagonal, which leaves their weights without influence on the others. Memory: one matrix of the hessian's size.

    Args:
        hessian: (in_features, in_features) float32, symmetric, positive semidefinite; at the end as it was.
        damp: fraction of the mean diagonal.

    Raises:
        RuntimeError: the hessian is not finite, is zero, or stays indefinite after the last retry.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    if not _is_finite(hessian) or mean <= 0:
        raise RuntimeError(
            f"the hessian has mean diagonal {mean} or entries that are not finite; expected > 0"
        )
    for retry in range(DAMP_RETRIES + 1):
        used = damp * 10**retry
        found = Damping((diagonal + used * mean).masked_fill_(diagonal == 0, mean), used, retry)
        with damped(hessian, found):
            if inverse_factor(hessian.clone(memory_format=torch.contiguous_format)) is not None:
                return found
    smallest = torch.linalg.eigvalsh(hessian.double())[0].item()
    raise RuntimeError(
        f"Cholesky failed {DAMP_RETRIES + 1} times, last with damp {used:g}; smallest eigenvalue {smallest:g}, "
        f"mean diagonal {mean:g}: raise damp or use more calibration tokens"
    )


@contextmanager
def damped(hessian: Tensor, damping: Damping) -> Iterator[None]:
    """Damp a hessian in place, until the end: a copy would be the largest matrix of a wide layer once more."""
    before = hessian.diagonal().clone()
    try:
        hessian.diagonal().copy_(damping.diagonal)
        yield
    finally:
        hessian.diagonal().copy_(before)


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """The upper factor U of the inverse, H^-1 = U^T U; None if it cannot be computed.

    Each step writes over the one before, so no second matrix is needed, and the argument is lost.

    Args:
        hessian: (in_features, in_features) float32, symmetric and contiguous.
    """
    A = hessian.mT  # LAPACK's order of the columns; the same matrix
    info = torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(A, out=(A, info))
    if info.item() != 0:
        return None
    torch.cholesky_inverse(A, out=A)
    torch.linalg.cholesky_ex(A, upper=True, out=(A, info))
    return A if info.item() == 0 and _is_finite(A) else None


def _is_finite(matrix: Tensor) -> bool:
    """Whether all values are finite; `torch.isfinite` would make a copy of them."""
    return all(math.isfinite(value.item()) for value in torch.aminmax(matrix))


def shift_target(weight: Tensor, shift: Tensor, hessian: Tensor, alpha: float) -> Tensor:
    """Return T = W + alpha W D H^-1, the least-squares target of inputs that differ between the two paths.

    Minimising ||(What U - W F) S^(1/2)||^2 over What has the unconstrained solution W (F S U^T) H^-1
    = W + W D H^-1 with D = (F - U) S U^T; alpha goes from W (0) to that solution (1), as in GPTAQ.

    Args:
        weight: (out_features, in_features) float32.
        shift: (out_features, in_features) float32, the product W D (or any other cross moment).
        hessian: (in_features, in_features) float32, damped.
        alpha: strength of the shift, 0 to 1.
    """
    if alpha == 0:
        return weight
    solved = torch.cholesky_solve(shift.T, torch.linalg.cholesky(hessian)).T
    return solved.mul_(alpha).add_(weight)


def proxy_loss(quantized: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Return tr[(What - T) H (What - T)^T] for each row, (out_features,) float32."""
    error = quantized - target
    return (error @ hessian).mul_(error).sum(1)


def subtract_product(result: Tensor, a: Tensor, b: Tensor) -> None:
    """Subtract a b from `result` in place, some columns at a time, so that the product is never there as a whole.

    Args:
        result: (n, m) float32.
        a: (n, k) float32.
        b: (k, m) float32.
    """
    n_columns = result.shape[1]
    for start in range(0, max(1, n_columns - SLICE_COLUMNS + 1), SLICE_COLUMNS):
        end = start + SLICE_COLUMNS if start + 2 * SLICE_COLUMNS <= n_columns else n_columns
        result[:, start:end] -= a @ b[:, start:end]
