"""Coordinate descent on the codes and, group by group, closed-form refits of the grid.

    L(What) = tr[(What - T) H (What - T)^T],   residual gradient R = (T - What) H

For a fixed grid the best value of one weight, all others held, is the grid point nearest to what_j + R_j /
H_jj (QuantEase, CDQuant); a change d of column j moves the gradient by R -= d H_{j,:}. For fixed codes the
grid of one group that minimises L, all else held, solves a small linear system: with the group's part of
the weights written as A p (A holds the levels of the codes, p the scale and offset, or the two planes'
scales), (A^T H_gg A) dp = A^T R_g. A refit is taken, row by row, only where the stored (rounded) grid
lowers the loss, so L never rises.
"""

import torch
from torch import Tensor

from vlmq.formats import Format, QuantizedWeight
from vlmq.linalg import damped, find_damping, subtract_product
from vlmq.solvers.grid import Grid, align, round_to_grid
from vlmq.solvers.rtn import fit_groups


def refine(
    quantized: QuantizedWeight,
    target: Tensor,
    hessian: Tensor,
    *,
    damp: float = 0.01,
    n_sweeps: int = 4,
    tolerance: float = 1e-3,
    refit_grid: bool = True,
) -> QuantizedWeight:
    """Lower the loss of a quantized weight; every solver's result can be refined.

    Args:
        quantized: (out_features, in_features), the start; its grid is kept until a refit lowers the loss.
        target: (out_features, in_features) float32.
        hessian: (in_features, in_features) float32, not damped.
        damp: fraction of the mean diagonal added to the hessian.
        n_sweeps: most passes over all columns.
        tolerance: stop when a pass lowers the loss by less than this fraction.
        refit_grid: refit each group's grid after its columns.
    """
    with damped(hessian, find_damping(hessian, damp)):
        return _descend(quantized, target, hessian, n_sweeps, tolerance, refit_grid)


def _descend(
    quantized: QuantizedWeight, target: Tensor, H: Tensor, n_sweeps: int, tolerance: float, refit_grid: bool
) -> QuantizedWeight:
    """`refine` with the damped hessian. Memory: target, values, R and one difference, 16 bytes for each weight."""
    format, in_features = quantized.format, target.shape[1]
    size = in_features if quantized.group_size is None else quantized.group_size
    codes = quantized.codes.clone()
    scales = quantized.scales.float()
    zeros = None if quantized.zeros is None else quantized.zeros.float() * format.zero_step
    values, R = quantized.dequantize(), torch.empty_like(target)
    loss = _residual(values, target, H, R)
    groups = list(enumerate(torch.arange(in_features, device=H.device).split(size)))
    groups.sort(key=lambda g: H.diagonal()[g[1]].mean().item(), reverse=True)
    for _ in range(n_sweeps):
        for g, columns in groups:
            a, b = int(columns[0]), int(columns[-1]) + 1
            grid = Grid(scales[:, g], None if zeros is None else zeros[:, g])
            block = _sweep(values[:, a:b], codes[:, a:b].float(), R[:, a:b], H[a:b, a:b], grid, format)
            if refit_grid:
                gradient = R[:, a:b] - (block[1] - values[:, a:b]) @ H[a:b, a:b]
                grid, aligned = align(*block, gradient, H[a:b, a:b], grid, format)
                block = (block[0], aligned)
                scales[:, g] = grid.scales
                if zeros is not None and grid.zeros is not None:
                    zeros[:, g] = grid.zeros
            new_codes, new_values = block
            subtract_product(R, new_values - values[:, a:b], H[a:b])
            codes[:, a:b], values[:, a:b] = new_codes, new_values
        previous, loss = loss, _residual(values, target, H, R)
        if previous - loss < tolerance * previous:
            break
    stored_zeros = None if zeros is None else (zeros / format.zero_step).round().to(torch.uint8)
    return QuantizedWeight(codes, scales.half(), stored_zeros, format, quantized.group_size)


def _residual(values: Tensor, target: Tensor, H: Tensor, R: Tensor) -> Tensor:
    """Put (target - values) H into R; returns the loss, a float32 scalar."""
    error = target - values
    torch.mm(error, H, out=R)
    return error.mul_(R).sum()


def _sweep(
    values: Tensor, codes: Tensor, R: Tensor, H: Tensor, grid: Grid, format: Format
) -> tuple[Tensor, Tensor]:
    """One pass over the columns of a group; returns codes and values, both (rows, group)."""
    R = R.T.contiguous()  # (group, rows)
    new_values, new_codes = values.T.contiguous(), codes.T.contiguous()
    diagonal = H.diagonal().tolist()
    for j, pivot in enumerate(diagonal):
        wanted = torch.add(new_values[j], R[j], alpha=1 / pivot)
        code, value = round_to_grid(wanted[:, None], grid, format)
        R.addr_(H[j], value[:, 0] - new_values[j], alpha=-1)
        new_values[j], new_codes[j] = value[:, 0], code[:, 0]
    return new_codes.T, new_values.T


def solve(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator | None = None,
    damp: float = 0.01,
    n_sweeps: int = 16,
    tolerance: float = 1e-3,
    refit_grid: bool = True,
) -> QuantizedWeight:
    """Coordinate descent from the weighted k-means start; arguments as in `refine`."""
    start = fit_groups(target, hessian.diagonal(), format, group_size, n_steps=8)
    return refine(
        start, target, hessian, damp=damp, n_sweeps=n_sweeps, tolerance=tolerance, refit_grid=refit_grid
    )
