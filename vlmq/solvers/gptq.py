"""GPTQ with the grid of each group fitted inside the feedback.

    L = tr[(What - T) H (What - T)^T],   H^-1 = U^T U with U upper triangular (Frantar et al. 2022)

Columns are rounded one after the other; the error of column j, e = (w_j - what_j) / U_jj, is spread over the
columns that follow, W_{:,j:} -= e U_{j,j:}. The loss is then exactly sum_j |e_j|^2, so the loss that a grid
causes is known as soon as its group is rounded. That is used twice: a group's grid is fitted to the weights
as compensated so far, with importance 1 / U_jj^2, and several candidate grids are carried through the
group, each row keeping the one of least true loss.

Act-order without a stored permutation ("static groups"): groups stay contiguous in the matrix; the groups
are visited in order of their mean diag(H), and columns inside a group in order of diag(H), both descending.
"""

import torch
from torch import Tensor

from vlmq.formats import Format, QuantizedWeight, n_groups
from vlmq.linalg import damped, find_damping, inverse_factor, subtract_product
from vlmq.solvers.grid import Grid, fit_grid, round_to_grid, stored


def column_order(diagonal: Tensor, group_size: int, act_order: bool) -> list[Tensor]:
    """Columns of each group in the order of visit: a list of (group,) int64 index tensors."""
    columns = torch.arange(diagonal.numel(), device=diagonal.device).split(group_size)
    if not act_order:
        return list(columns)
    groups = sorted(columns, key=lambda c: diagonal[c].mean().item(), reverse=True)
    return [c[diagonal[c].argsort(descending=True)] for c in groups]


def solve(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator | None = None,
    damp: float = 0.01,
    act_order: bool = True,
    scale_factors: tuple[float, ...] = (1.0, 0.9, 1.1),
    n_steps: int = 8,
) -> QuantizedWeight:
    """Quantize with second-order feedback.

    Args:
        weight: (out_features, in_features) float32; not used, the grid follows the compensated target.
        target: (out_features, in_features) float32.
        hessian: (in_features, in_features) float32.
        format: the weight format.
        group_size: weights per group, None per channel.
        generator: not used, GPTQ is deterministic.
        damp: fraction of the mean diagonal added to the hessian.
        act_order: visit important groups and columns first.
        scale_factors: the fitted scales times these are the candidates of each group.
        n_steps: alternations of the grid fit; 0 takes the full range of each group, without any search.
    """
    in_features = weight.shape[1]
    size = in_features if group_size is None else group_size
    order = column_order(hessian.diagonal(), size, act_order)
    permutation = torch.cat(order)
    with damped(hessian, find_damping(hessian, damp)):
        U = inverse_factor(hessian[permutation[:, None], permutation])
    if U is None:
        raise RuntimeError("Cholesky failed for the columns in the order of visit: raise damp")
    W = target[:, permutation]
    codes = torch.empty_like(W, dtype=torch.uint8)
    scales = W.new_empty(W.shape[0], n_groups(in_features, group_size), format.n_terms)
    zeros = W.new_empty(scales.shape[:2]) if format.has_zero else None
    start = 0
    for columns in order:
        end = start + columns.numel()
        group = int(columns[0]) // size
        block = W[:, start:end]
        grid = fit_grid(block, U.diagonal()[start:end] ** -2, format, n_steps)
        codes[:, start:end], error, grid = _best_candidate(
            block, U[start:end, start:end], grid, format, scale_factors
        )
        subtract_product(W[:, end:], error, U[start:end, end:])
        scales[:, group] = grid.scales
        if zeros is not None and grid.zeros is not None:
            zeros[:, group] = grid.zeros / format.zero_step
        start = end
    return QuantizedWeight(
        codes[:, permutation.argsort()],
        scales.half(),
        None if zeros is None else zeros.round().to(torch.uint8),
        format,
        group_size,
    )


def _best_candidate(
    block: Tensor, U: Tensor, grid: Grid, format: Format, factors: tuple[float, ...]
) -> tuple[Tensor, Tensor, Grid]:
    """Carry every candidate through the group and keep, row by row, the one of least loss."""
    rows = block.shape[0]
    scales = torch.cat([grid.scales * f for f in factors])
    zeros = None if grid.zeros is None else grid.zeros.repeat(len(factors))
    candidates = stored(scales, zeros, format)
    codes, error = feedback(block.repeat(len(factors), 1), U, candidates, format)
    loss = (error**2).sum(1).view(len(factors), rows)
    chosen = loss.argmin(0) * rows + torch.arange(rows, device=block.device)
    zeros = None if candidates.zeros is None else candidates.zeros[chosen]
    return codes[chosen], error[chosen], Grid(candidates.scales[chosen], zeros)


def feedback(block: Tensor, U: Tensor, grid: Grid, format: Format) -> tuple[Tensor, Tensor]:
    """Round the columns of one group in turn, each error fed to the columns after it.

    Args:
        block: (rows, group) float32.
        U: (group, group) float32, the group's part of the upper factor.
        grid: the rows' grids.
        format: the weight format.

    Returns:
        codes (rows, group) and scaled errors e (rows, group), both float32.
    """
    block = block.T.clone(memory_format=torch.contiguous_format)  # (group, rows)
    codes, error = torch.empty_like(block), torch.empty_like(block)
    diagonal = U.diagonal().tolist()
    for j, pivot in enumerate(diagonal):
        code, value = round_to_grid(block[j][:, None], grid, format)
        codes[j] = code[:, 0]
        torch.sub(block[j], value[:, 0], out=error[j]).div_(pivot)
        if j + 1 < len(diagonal):
            block[j + 1 :].addr_(U[j, j + 1 :], error[j], alpha=-1)
    return codes.T, error.T
