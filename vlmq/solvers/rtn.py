"""Round to nearest, and k-means: each group fitted by itself, without feedback between columns.

    min over grid and codes of sum_j h_j (t_j - what_j)^2, for every row and group

`rtn` has h = 1: nearest rounding with a search of the range for the least squared error. `kmeans` has
h = diag(H), the mean square of each input: the grid that weighted 1-D k-means gives, exact for symmetric
ternary (see `vlmq.solvers.grid.fit_ternary`). Both are starts for `cd`, and the floor that feedback has to
beat.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmq.formats import Format, QuantizedWeight, n_groups, row_slices
from vlmq.solvers.grid import fit_grid, round_to_grid


def solve(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator | None = None,
    n_steps: int = 8,
) -> QuantizedWeight:
    """Round every group to the grid of least squared weight error; the hessian is not used.

    Args:
        weight: (out_features, in_features) float32; only `target` is rounded.
        target: (out_features, in_features) float32.
        hessian: (in_features, in_features) float32.
        format: the weight format.
        group_size: weights per group, None per channel.
        generator: not used.
        n_steps: alternations of the grid fit.
    """
    return fit_groups(target, torch.ones_like(target[0]), format, group_size, n_steps)


def solve_kmeans(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator | None = None,
    n_steps: int = 16,
) -> QuantizedWeight:
    """Round every group to its weighted k-means grid, with importance diag(H); arguments as in `solve`."""
    return fit_groups(target, hessian.diagonal(), format, group_size, n_steps)


def fit_groups(
    weight: Tensor, importance: Tensor, format: Format, group_size: int | None, n_steps: int
) -> QuantizedWeight:
    """Fit and round all groups of a matrix, a slice of rows at a time.

    Args:
        weight: (out_features, in_features) float32.
        importance: (in_features,) float32, >= 0.
        format: the weight format.
        group_size: weights per group, None per channel.
        n_steps: alternations of the grid fit.
    """
    out_features, in_features = weight.shape
    groups = n_groups(in_features, group_size)
    size = group_size or in_features
    missing = groups * size - in_features
    h = pad(importance, (0, missing)).view(1, groups, size)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = weight.new_empty(out_features, groups, format.n_terms, dtype=torch.float16)
    zeros = weight.new_empty(out_features, groups, dtype=torch.uint8) if format.has_zero else None
    for rows in row_slices(out_features, in_features):
        part = pad(weight[rows], (0, missing)).view(-1, size)  # (n_rows * groups, size)
        grid = fit_grid(part, h.expand(len(part) // groups, -1, -1).reshape(-1, size), format, n_steps)
        nearest, _ = round_to_grid(part, grid, format)
        codes[rows] = nearest.view(-1, groups * size)[:, :in_features].to(torch.uint8)
        scales[rows] = grid.scales.half().view(-1, groups, format.n_terms)
        if zeros is not None and grid.zeros is not None:
            zeros[rows] = (grid.zeros / format.zero_step).round().to(torch.uint8).view(-1, groups)
    return QuantizedWeight(codes, scales, zeros, format, group_size)
