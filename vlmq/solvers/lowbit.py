"""Ternary and binary weights: grids fitted inside the feedback, then a long coordinate descent with refits.

Ternary follows PT2-LLM (ICLR 2026) and binary ARB-LLM with its calibrated variant: codes and grid of a group are
alternated in closed form on the compensated weights (for symmetric ternary the exact optimum stands in place of the
iteration, see `vlmq.solvers.grid`), and the error is compensated by the columns that follow. The alignment of the grid
to the hessian with the codes held, which both papers do group by group, is done in the coordinate descent that
follows, where all other groups are known (`vlmq.solvers.grid.align`). Two planes (ternary2, binary2) are fitted
together: a code is the best pair, and both scales solve one 2 x 2 system. ARB-LLM's column scales are not part of the
format and are left out.

One recipe for both families: what differs between them is the format. The names `ternary` and `binary` say which
formats it is meant for; `vlmq.solvers.recipe` refuses the others.
"""

import torch
from torch import Tensor

from vlmq.formats import Format, QuantizedWeight
from vlmq.solvers import cd, gptq


def solve(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator | None = None,
    damp: float = 0.01,
    n_sweeps: int = 8,
) -> QuantizedWeight:
    """Fit ternary or binary weights; arguments as in `gptq.solve` and `cd.refine`."""
    start = gptq.solve(weight, target, hessian, format, group_size, damp=damp)
    return cd.refine(start, target, hessian, damp=damp, n_sweeps=n_sweeps)
