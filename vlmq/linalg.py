"""Linear algebra of the quantization objective; knows no layer and no model.

Every solver minimises, over weights What on a grid,

    L(What) = tr[(What - T) H (What - T)^T],      H = U S U^T / sum(s) + lambda mean(diag H) I

with T the target of (out_features, in_features) and H the weighted second moment of the inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMP = 0.01
DAMP_RETRIES = 6


@dataclass(frozen=True)
class Damped:
    """A positive definite hessian, the upper factor U of its inverse (H^-1 = U^T U), and the damping used."""

    hessian: Tensor
    factor: Tensor
    damp: float
    n_retries: int


def damp_and_factor(hessian: Tensor, damp: float = DAMP) -> Damped:
    """Add `damp` times the mean diagonal to the hessian and factor its inverse.

    The damping is raised tenfold, at most DAMP_RETRIES times, while the Cholesky factorisation fails; the
    damping that was used is returned, so that it can be reported. Inputs that are always zero get the mean
    diagonal, which leaves their weights without influence on the others.

    Args:
        hessian: (in_features, in_features) float32, symmetric, positive semidefinite.
        damp: fraction of the mean diagonal.

    Raises:
        RuntimeError: the hessian is not finite, is zero, or stays indefinite after the last retry.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    if not torch.isfinite(hessian).all() or mean <= 0:
        raise RuntimeError(
            f"the hessian has mean diagonal {mean} or entries that are not finite; expected > 0"
        )
    for retry in range(DAMP_RETRIES + 1):
        used = damp * 10**retry
        damped = hessian.clone()
        damped.diagonal().add_(used * mean)
        damped.diagonal()[diagonal == 0] = mean
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if info.item() == 0 and torch.isfinite(factor).all():
                return Damped(damped, factor, used, retry)
    smallest = torch.linalg.eigvalsh(hessian.double())[0].item()
    raise RuntimeError(
        f"Cholesky failed {DAMP_RETRIES + 1} times, last with damp {used:g}; smallest eigenvalue {smallest:g}, "
        f"mean diagonal {mean:g}: raise damp or use more calibration tokens"
    )


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
    return weight + alpha * torch.cholesky_solve(shift.T, torch.linalg.cholesky(hessian)).T


def proxy_loss(quantized: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Return tr[(What - T) H (What - T)^T] for each row, (out_features,) float32."""
    error = quantized - target
    return ((error @ hessian) * error).sum(1)
