"""The grid of a quantized matrix as something to learn: scales and zero points, the codes held.

    What[o, i] = sum_t m[o, g, t] s[o, g, t] (L[q[o, i], t] - z[o, g])

m are multipliers of the scales, 1 at the start, z the zero points in levels. In the forward both are rounded to what is
stored (float16 scales, zero points in fixed point bytes), in the backward the rounding is passed over (straight-through
estimation), so what is learned is exactly what `stored` writes. Learning the grid with the codes held is the second
phase of EfficientQAT (Chen et al. 2024); here the codes come from the feedback solution.

Memory: 4 n_terms bytes for each weight (levels), and as much again while a gradient is taken.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmq.formats import QuantizedWeight, n_groups

SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER = 0.25, 4.0
LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class LearnedOptions:
    """Options of the step `learned`, see `vlmq.learning`.

    `n_epochs`: passes over the training calls. `lr`: step of a zero point in levels, and of a scale as far as it moves
    the outermost level; it falls to 0 along half a cosine. `validation_share`: share of the calls that is held out.
    """

    n_epochs: int = 4
    lr: float = 0.01
    validation_share: float = 0.125

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: an option is out of its range.
        """
        if self.n_epochs < 1 or self.lr <= 0 or not 0 < self.validation_share < 1:
            raise ValueError(
                "solver 'learned': expected n_epochs >= 1, lr > 0 and validation_share between 0 and 1, got "
                f"n_epochs {self.n_epochs}, lr {self.lr:g}, validation_share {self.validation_share:g}"
            )


class LearnableGrid(nn.Module):
    """Scales and zero points of one quantized matrix as parameters; the codes stay as they are."""

    def __init__(self, quantized: QuantizedWeight) -> None:
        super().__init__()
        self.start = quantized
        format = quantized.format
        out_features, in_features = quantized.codes.shape
        groups = n_groups(in_features, quantized.group_size)
        size = quantized.group_size or in_features
        table = torch.tensor(format.levels, dtype=torch.float32, device=quantized.codes.device)
        codes = pad(quantized.codes, (0, groups * size - in_features)).long()
        self._levels = table[codes].view(out_features, groups, size, format.n_terms)
        self._scales = quantized.scales.float()[:, :, None, :]  # (out_features, n_groups, 1, n_terms)
        self.multipliers = nn.Parameter(torch.ones_like(self._scales))
        self.zeros: nn.Parameter | None = None
        if quantized.zeros is not None:
            self.zeros = nn.Parameter(quantized.zeros.float()[:, :, None, None] * format.zero_step)

    def forward(self) -> Tensor:
        """The weights, (out_features, in_features) float32, as they would be stored now."""
        scales = self.multipliers * self._scales
        scales = scales + (scales.detach().half().float() - scales.detach())
        levels = self._levels
        if self.zeros is not None:
            step = self.start.format.zero_step
            stored = (self.zeros.detach() / step).round() * step
            levels = levels - (self.zeros + (stored - self.zeros.detach()))
        return (levels * scales).sum(-1).flatten(1)[:, : self.start.codes.shape[1]]

    @torch.no_grad()
    def project(self) -> None:
        """Bring the parameters back into the range of what can be stored."""
        limit = (LARGEST_SCALE / self._scales.abs()).clamp(max=LARGEST_MULTIPLIER)
        self.multipliers.clamp_(min=SMALLEST_MULTIPLIER).clamp_(max=limit)
        if self.zeros is not None:
            self.zeros.clamp_(0, 255 * self.start.format.zero_step)

    @torch.no_grad()
    def stored(self) -> QuantizedWeight:
        """The quantized weight with the grid as it is now."""
        format, zeros = self.start.format, None
        if self.zeros is not None:
            zeros = (self.zeros[:, :, 0, 0] / format.zero_step).round().to(torch.uint8)
        scales = (self.multipliers * self._scales)[:, :, 0].half()
        return QuantizedWeight(self.start.codes, scales, zeros, format, self.start.group_size)


def parameter_groups(grids: Iterable[LearnableGrid], lr: float) -> list[dict[str, Any]]:
    """Parameters for torch.optim; a step moves zero points, and outermost levels by their scale, by `lr` levels."""
    groups: list[dict[str, Any]] = []
    for grid in grids:
        reach = max(1.0, (grid.start.format.n_levels ** (1 / grid.start.format.n_terms) - 1) / 2)
        groups.append({"params": [grid.multipliers], "lr": lr / reach})
        if grid.zeros is not None:
            groups.append({"params": [grid.zeros], "lr": lr})
    return groups
