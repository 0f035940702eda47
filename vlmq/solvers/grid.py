"""The grid of one group: rounding to it, and fitting it.

A grid is a scale per term and, for formats that have one, a zero point (see `vlmq.formats.format`). All
functions work on many rows at once; a row is one output channel's weights in one group. Importances h >= 0
weigh the squared error of each column, sum_j h_j (w_j - what_j)^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmq.formats import Format, get_format

SHRINK_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SMALLEST_SCALE = 2.0**-20


@dataclass(frozen=True)
class Grid:
    """Grids of many rows: `scales` (rows, n_terms) float32 of float16 values, `zeros` (rows,) in levels or None.

    `zeros` is float32 and a multiple of the format's zero step; formats without a zero point have None.
    """

    scales: Tensor
    zeros: Tensor | None

    def where(self, mask: Tensor, other: "Grid") -> "Grid":
        """Take this grid where `mask` (rows,) holds and the other elsewhere."""
        zeros = (
            None if self.zeros is None or other.zeros is None else torch.where(mask, self.zeros, other.zeros)
        )
        return Grid(torch.where(mask[:, None], self.scales, other.scales), zeros)


def stored(scales: Tensor, zeros: Tensor | None, format: Format) -> Grid:
    """Round a fitted grid to what is stored: float16 scales, zero points in fixed point bytes."""
    scales = scales.clamp(-65504, 65504)
    scales = torch.where(scales.abs() < SMALLEST_SCALE, torch.full_like(scales, SMALLEST_SCALE), scales)
    if zeros is not None:
        zeros = (zeros / format.zero_step).round().clamp(0, 255) * format.zero_step
    return Grid(scales.half().float(), zeros)


def grid_values(grid: Grid, format: Format) -> Tensor:
    """The value of every code, (rows, n_levels)."""
    levels = torch.tensor(format.levels, dtype=torch.float32, device=grid.scales.device)
    values = grid.scales @ levels.T
    return values if grid.zeros is None else values - (grid.scales[:, 0] * grid.zeros)[:, None]


def round_to_grid(weight: Tensor, grid: Grid, format: Format) -> tuple[Tensor, Tensor]:
    """Nearest code of every weight.

    Args:
        weight: (rows, columns) float32.
        grid: the rows' grids.
        format: the weight format.

    Returns:
        codes (rows, columns) float32 holding integers, and their values (rows, columns) float32.
    """
    if format.n_terms == 1:
        return _round_to_line(weight, grid, format)
    values = grid_values(grid, format)
    codes = (weight[..., None] - values[:, None, :]).abs().argmin(-1)
    return codes.float(), values.gather(1, codes)


def _round_to_line(weight: Tensor, grid: Grid, format: Format) -> tuple[Tensor, Tensor]:
    first = format.levels[0][0]
    step = format.levels[1][0] - first
    unit = grid.scales * step  # (rows, 1)
    base = grid.scales * first if grid.zeros is None else -grid.scales * grid.zeros[:, None]
    codes = ((weight - base) / unit).round_().clamp_(0, format.n_levels - 1)
    return codes, torch.addcmul(base.expand_as(codes), codes, unit)


def fit_grid(weight: Tensor, importance: Tensor, format: Format, n_steps: int = 8) -> Grid:
    """Fit the grid of least weighted squared error.

    Symmetric ternary is exact (`fit_ternary`). All others alternate two steps, neither of which raises the error before
    storage rounding: nearest codes for the grid, then the closed-form weighted least squares grid for the codes (1-D
    k-means on an affine or planar set of centroids). Of several shrunken ranges the one that is best after one
    alternation is the start.

    Args:
        weight: (rows, columns) float32.
        importance: (columns,) or (rows, columns) float32, >= 0.
        format: the weight format.
        n_steps: alternations; 0 takes the full range of each row, without any search.
    """
    importance = importance.expand_as(weight)
    if format.name == "ternary":
        return fit_ternary(weight, importance)
    if n_steps == 0:
        return starts(weight, format)[0]

    def improve(grid: Grid, n: int) -> Grid:
        for _ in range(n):
            codes, _ = round_to_grid(weight, grid, format)
            grid = refit(weight, importance, codes, grid, format)
        return grid

    def error(grid: Grid) -> Tensor:
        _, values = round_to_grid(weight, grid, format)
        return (importance * (weight - values) ** 2).sum(1)

    first, *others = (improve(start, 1) for start in starts(weight, format))
    best, best_error = first, error(first)
    for other in others:
        other_error = error(other)
        better = other_error < best_error
        best, best_error = other.where(better, best), torch.where(better, other_error, best_error)
    return improve(best, n_steps - 1)


def fit_ternary(weight: Tensor, importance: Tensor) -> Grid:
    """Fit {-a, 0, +a} exactly.

    With codes sign(w) 1[|w| > a/2], sort |w| in descending order and let A_k = sum_{i<=k} h_i |w_i| and
    N_k = sum_{i<=k} h_i: the error is sum h w^2 - max_k A_k^2 / N_k and a = A_k / N_k at the best k.
    """
    size, order = weight.abs().sort(dim=1, descending=True)
    h = importance.gather(1, order)
    total = (h * size).cumsum(1)
    mass = h.cumsum(1).clamp(min=1e-30)
    best = (total**2 / mass).argmax(1, keepdim=True)
    return stored((total / mass).gather(1, best), None, get_format("ternary"))


def starts(weight: Tensor, format: Format) -> list[Grid]:
    """Ranges to start from: the full range of each row and shrunken ones."""
    if format.n_terms == 2:
        size = weight.abs().mean(1, keepdim=True)
        ratios = ((1.0, 0.5), (1.2, 0.4), (1.4, 0.7)) if format.n_levels == 4 else ((1.2, 0.5), (1.6, 0.5))
        return [stored(torch.cat([size * a, size * b], 1), None, format) for a, b in ratios]
    n = format.n_levels - 1
    if format.name.startswith("binary"):
        mean, spread = weight.mean(1), (weight - weight.mean(1, keepdim=True)).abs().mean(1)
        if not format.has_zero:
            return [stored(weight.abs().mean(1, keepdim=True), None, format)]
        return [stored((2 * spread)[:, None], (spread - mean) / (2 * spread).clamp(min=1e-12), format)]
    factors = SHRINK_FACTORS if format.bits < 8 else (1.0,)
    if not format.has_zero:
        limit = weight.abs().amax(1, keepdim=True)
        return [stored(f * limit / (format.n_levels // 2), None, format) for f in factors]
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    scale = ((high - low) / n).clamp(min=1e-12)
    middle = (high + low) / 2
    grids = []
    for f in factors:
        zero = n / 2 - f * middle / (f * scale)
        grids.append(stored((f * scale)[:, None], zero, format))
    return grids


def refit(weight: Tensor, importance: Tensor, codes: Tensor, grid: Grid, format: Format) -> Grid:
    """Closed-form weighted least squares grid for fixed codes; rows whose system is singular keep `grid`."""
    levels = torch.tensor(format.levels, dtype=torch.float32, device=weight.device)
    basis = levels[codes.long()]  # (rows, columns, n_terms)
    if format.n_terms == 1 and not format.has_zero:
        x = basis[..., 0]
        scale = (importance * x * weight).sum(1) / (importance * x * x).sum(1).clamp(min=1e-30)
        usable = scale > SMALLEST_SCALE
        return stored(scale[:, None], None, format).where(usable, grid)
    first, second = basis[..., 0], torch.ones_like(weight) if format.has_zero else basis[..., 1]
    scale, other, usable = solve_two(
        (importance * first * first).sum(1),
        (importance * first * second).sum(1),
        (importance * second * second).sum(1),
        (importance * first * weight).sum(1),
        (importance * second * weight).sum(1),
    )
    usable &= scale > SMALLEST_SCALE
    if not format.has_zero:
        return stored(torch.stack([scale, other], 1), None, format).where(usable, grid)
    safe = torch.where(usable, scale, torch.ones_like(scale))
    return stored(safe[:, None], -other / safe, format).where(usable, grid)


def align(
    codes: Tensor, values: Tensor, gradient: Tensor, H: Tensor, grid: Grid, format: Format
) -> tuple[Grid, Tensor]:
    """Best grid for the codes of one group under a full hessian (the grid alignment of PT2-LLM).

    With the weights of the group written as A p (A holds the levels of the codes, p the scale and the
    offset, or the scales of two planes) the loss changes by dp^T A^T H A dp - 2 dp^T A^T gradient, which is
    least at dp = (A^T H A)^-1 A^T gradient. A row takes the new grid only if its stored form lowers the
    loss.

    Args:
        codes: (rows, group) float32 holding integers.
        values: (rows, group) float32, the codes' values on `grid`.
        gradient: (rows, group) float32, (target - values) H including all that is coupled to the group.
        H: (group, group) float32.
        grid: the rows' grids.
        format: the weight format.

    Returns:
        the grid and the values (rows, group) of the unchanged codes on it.
    """
    levels = torch.tensor(format.levels, dtype=torch.float32, device=codes.device)
    basis = levels[codes.long()]  # (rows, group, n_terms)
    first = basis[..., 0]
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
    return new.where(better, grid), torch.where(better[:, None], new_values, values)


def solve_two(a: Tensor, b: Tensor, c: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve [[a, b], [b, c]] [s, t] = [x, y] for many rows; the third result marks well-posed systems."""
    determinant = a * c - b * b
    usable = determinant > 1e-6 * a * c
    safe = torch.where(usable, determinant, torch.ones_like(determinant))
    return (c * x - b * y) / safe, (a * y - b * x) / safe, usable
