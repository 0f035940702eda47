"""Ternary and binary weights: iterative fits inside the feedback, aligned to the hessian, then coordinate descent.

Ternary follows PT2-LLM (ICLR 2026) and binary ARB-LLM with its calibrated variant: codes and grid are
alternated in closed form (for symmetric ternary the exact optimum stands in place of the iteration), the
grid is then aligned to the hessian with the codes held, and the error is compensated by the columns that
follow. Two differences: the alignment uses the hessian conditioned on the columns already done, S = (U^T
U)^-1, which is the loss that remains after compensation, and it is alternated with renewed feedback, each
row keeping its best; and coordinate descent with refits follows. Two planes (ternary2, binary2) are fitted
together: a code is the best pair, and both scales solve one 2 x 2 system. ARB-LLM's column scales are not part of
the format and are left out.
"""

import torch
from torch import Tensor

from vlmq.formats import Format, QuantizedWeight
from vlmq.solvers import cd, gptq


def solve_ternary(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator | None = None,
    damp: float = 0.01,
    n_align: int = 4,
    n_sweeps: int = 8,
) -> QuantizedWeight:
    """Fit ternary weights; arguments as in `gptq.solve` and `cd.refine`.

    Raises:
        ValueError: the format is not ternary.
    """
    _check_family(format, "ternary")
    start = gptq.solve(weight, target, hessian, format, group_size, damp=damp, n_align=n_align)
    return cd.refine(start, target, hessian, damp=damp, n_sweeps=n_sweeps)


def solve_binary(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator | None = None,
    damp: float = 0.01,
    n_align: int = 4,
    n_sweeps: int = 8,
) -> QuantizedWeight:
    """Fit binary weights; arguments as in `gptq.solve` and `cd.refine`.

    Raises:
        ValueError: the format is not binary.
    """
    _check_family(format, "binary")
    start = gptq.solve(weight, target, hessian, format, group_size, damp=damp, n_align=n_align)
    return cd.refine(start, target, hessian, damp=damp, n_sweeps=n_sweeps)


def _check_family(format: Format, family: str) -> None:
    if not format.name.startswith(family):
        raise ValueError(
            f"solver {family!r} solves {family} formats only, got {format.name!r}; use 'gptq+cd' for it"
        )
