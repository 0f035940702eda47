"""Coordinate descent on the codes and, group by group, closed-form refits of the grid.

    L(What) = tr[(What - T) H (What - T)^T],   residual gradient R = (T - What) H

For a fixed grid the best value of one weight, all others held, is the grid point nearest to what_j + R_j / H_jj
(QuantEase, CDQuant); a change d of column j moves the gradient by R -= d H_{j,:}. For fixed codes the grid of one
group that minimises L, all else held, solves a small linear system: with the group's part of the weights written as
A p (A holds the levels of the codes, p the scale and offset, or the two planes' scales), (A^T H_gg A) dp = A^T R_g.
A refit is taken, row by row, only where the stored (rounded) grid lowers the loss, so L never rises.
"""

import torch
from torch import Tensor

from vlmq.formats import Format, QuantizedWeight
from vlmq.linalg import damp_and_factor
from vlmq.solvers.grid import Grid, grid_values, round_to_grid, solve_two, stored


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
    H = damp_and_factor(hessian, damp).hessian
    format, in_features = quantized.format, target.shape[1]
    size = in_features if quantized.group_size is None else quantized.group_size
    codes = quantized.codes.float()
    scales = quantized.scales.float()
    zeros = None if quantized.zeros is None else quantized.zeros.float() * format.zero_step
    values = quantized.dequantize()
    R = (target - values) @ H
    loss = ((target - values) * R).sum()
    groups = list(enumerate(torch.arange(in_features, device=H.device).split(size)))
    groups.sort(key=lambda g: H.diagonal()[g[1]].mean().item(), reverse=True)
    for _ in range(n_sweeps):
        for g, columns in groups:
            a, b = int(columns[0]), int(columns[-1]) + 1
            grid = Grid(scales[:, g], None if zeros is None else zeros[:, g])
            block = _sweep(values[:, a:b], codes[:, a:b], R[:, a:b], H[a:b, a:b], grid, format)
            if refit_grid:
                grid, block = _refit(values[:, a:b], block, R[:, a:b], H[a:b, a:b], grid, format)
                scales[:, g] = grid.scales
                if zeros is not None and grid.zeros is not None:
                    zeros[:, g] = grid.zeros
            new_codes, new_values = block
            R -= (new_values - values[:, a:b]) @ H[a:b]
            codes[:, a:b], values[:, a:b] = new_codes, new_values
        R = (target - values) @ H
        previous, loss = loss, ((target - values) * R).sum()
        if previous - loss < tolerance * previous:
            break
    stored_zeros = None if zeros is None else (zeros / format.zero_step).round().to(torch.uint8)
    return QuantizedWeight(codes.to(torch.uint8), scales.half(), stored_zeros, format, quantized.group_size)


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


def _refit(
    old: Tensor, block: tuple[Tensor, Tensor], R: Tensor, H: Tensor, grid: Grid, format: Format
) -> tuple[Grid, tuple[Tensor, Tensor]]:
    """Best grid for the codes of a group; kept where its stored form lowers the loss."""
    codes, values = block
    levels = torch.tensor(format.levels, dtype=torch.float32, device=codes.device)
    basis = levels[codes.long()]  # (rows, group, n_terms)
    first = basis[..., 0]
    gradient = R - (values - old) @ H
    HA = first @ H
    a, x = (HA * first).sum(1), (first * gradient).sum(1)
    if format.n_terms == 1 and not format.has_zero:
        usable = a > 0
        scale = grid.scales[:, 0] + x / torch.where(usable, a, torch.ones_like(a))
        new = stored(scale[:, None], None, format)
    else:
        second = torch.ones_like(first) if format.has_zero else basis[..., 1]
        HB = second @ H
        c, y = (HB * second).sum(1), (second * gradient).sum(1)
        step, other, usable = solve_two(a, (HA * second).sum(1), c, x, y)
        scale = grid.scales[:, 0] + step
        if grid.zeros is None:
            new = stored(torch.stack([scale, grid.scales[:, 1] + other], 1), None, format)
        else:
            offset = -grid.scales[:, 0] * grid.zeros + other
            usable &= scale > 0
            new = stored(scale[:, None], -offset / torch.where(usable, scale, torch.ones_like(scale)), format)
    new_values = grid_values(new, format).gather(1, codes.long())
    change = new_values - values
    gain = 2 * (change * gradient).sum(1) - ((change @ H) * change).sum(1)
    better = usable & (gain > 0)
    return new.where(better, grid), (codes, torch.where(better[:, None], new_values, values))
