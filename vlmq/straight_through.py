"""A packed layer that trains: its grid, and if asked its codes, by straight-through estimation.

    W[o, i] = sum_t s[o, g, t] (L[q[o, i], t] - z[o, g])

What is trained is measured in units of its own, so that one learning rate suits all: scales as factors of their start,
s = f s_0, zero points, thresholds and latent weights in codes. The latent u of a weight lies in the cell of the code
that the solver found, as near as that allows to the original weight, so that the start is the solver's solution:

    u = clamp((w / s - L[0]) / (L[1] - L[0]) + z, q - c, q + c)        c = 0.45
    q = sum_k [u > k - 1/2 + d_k],  k = 1 .. n_levels - 1              d the thresholds' shifts, per group

Gradients pass through a step as if it were the ramp clamp(u - k + 1 - d_k, 0, 1): for d = 0 the sum of the ramps is
the clipped identity, the usual straight-through estimator (BinaryConnect; LSQ for the scales). Soft codes take the
logistic function of b (u - k + 1/2 - d_k) for the step and b grows until they are hard (as in CAT-Q and DSQ).
Stored numbers are rounded as the checkpoint rounds them (float16 scales, fixed-point zero points) in each forward, so
that what is trained is what is saved. Formats of two planes keep u in units of the first scale and take the nearest
level.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmq.formats import QuantizedWeight
from vlmq.formats.weight import expand_groups
from vlmq.linear import QuantLinear

TRAINABLE = ("scales", "zeros", "thresholds", "weights", "vectors")
CELL = 0.45
MAX_THRESHOLDS = 3


class TrainedLinear(nn.Module):
    """Stands in for a `QuantLinear` while it is trained; `packed` makes the layer that it has become.

    Parameters, each there if it is trained: `factors` (out_features, n_groups, n_terms), `zeros`
    (out_features, n_groups) in levels, `shifts` (out_features, n_groups, n_levels - 1), `latents`
    (out_features, in_features), all float32; `bias`. At the peak of a forward and backward pass a layer holds about
    8 + 4 n_levels float32 values per weight.
    """

    levels: Tensor
    start_scales: Tensor
    codes: Tensor

    def __init__(self, layer: QuantLinear, original: Tensor, trained: set[str]) -> None:
        """Start from a packed layer.

        Args:
            layer: the packed layer; its report and sizes go to the packed result.
            original: (out_features, in_features) the weight before quantization.
            trained: of TRAINABLE; thresholds only where the format is one line of at most four levels.
        """
        super().__init__()
        self.layer = [layer]  # in a list, so that it is no submodule
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.format, self.group_size = layer.format, layer.group_size
        self.sharpness: float | None = None
        start = layer.quantized_weight()
        levels = torch.tensor(self.format.levels, device=start.scales.device)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("start_scales", start.scales.float(), persistent=False)
        zeros = None if start.zeros is None else start.zeros.float() * self.format.zero_step
        self.factors = _parameter(torch.ones_like(self.start_scales), "scales" in trained)
        self.zeros = None if zeros is None else _parameter(zeros, "zeros" in trained)
        is_line = self.format.n_terms == 1
        has_thresholds = is_line and self.format.n_levels - 1 <= MAX_THRESHOLDS and "thresholds" in trained
        self.is_code_trained = has_thresholds or "weights" in trained
        self.register_buffer("codes", start.codes, persistent=False)
        if self.is_code_trained:
            self.latents = _parameter(self._first_latents(original, start), "weights" in trained)
        shape = (*start.scales.shape[:2], self.format.n_levels - 1)
        self.shifts = _parameter(torch.zeros(shape, device=levels.device), True) if has_thresholds else None
        self.bias = None if layer.bias is None else _parameter(layer.bias.detach(), "vectors" in trained)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., in_features)."""
        return F.linear(x, self.dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """The weight as it is now, for model code that reads its dtype."""
        return self.dense().detach().to(self.layer[0].dtype)

    def dense(self) -> Tensor:
        """The weight (out_features, in_features) float32, with its graph."""
        scales, zeros = self._stored_scales(), self._stored_zeros()
        units = self._units()
        if zeros is not None:
            units = units - expand_groups(zeros, self.group_size, self.in_features)[..., None]
        wide = expand_groups(
            scales, self.group_size, self.in_features
        )  # (out_features, in_features, n_terms)
        weight = (units * wide).sum(-1)
        if self.is_code_trained and self.format.n_terms > 1:
            weight = weight + (self.latents - self.latents.detach()) * wide[..., 0].detach()
        return weight

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Keep latents within reach of the outer levels, after a step of the optimizer."""
        if self.is_code_trained and self.format.n_terms == 1:
            self.latents.clamp_(-CELL, self.format.n_levels - 1 + CELL)
        if self.zeros is not None:
            self.zeros.clamp_(0, 255 * self.format.zero_step)

    @torch.no_grad()
    def packed(self, note: str) -> QuantLinear:
        """The layer as it is now, packed; `note` goes to its report."""
        zeros = None
        if self.zeros is not None:
            zeros = (self.zeros / self.format.zero_step).round().clamp(0, 255).to(torch.uint8)
        scales = (self.start_scales * self.factors).half()
        codes = self._hard_codes().to(torch.uint8)
        quantized = QuantizedWeight(codes, scales, zeros, self.format, self.group_size)
        before = self.layer[0]
        layer = QuantLinear.from_quantized(quantized, self.bias, dtype=before.dtype)
        if before.report is not None:
            layer.report = replace(before.report, notes=(*before.report.notes, note))
        return layer

    def _first_latents(self, original: Tensor, start: QuantizedWeight) -> Tensor:
        """Latents in the cells of the codes; of two planes at the levels themselves."""
        wide = expand_groups(start.scales.float(), self.group_size, self.in_features)
        if self.format.n_terms > 1:
            return start.dequantize() / wide[..., 0]
        first, step = self._line()
        units = original.float() / wide[..., 0]
        if self.zeros is not None:
            units = units + expand_groups(self.zeros.detach(), self.group_size, self.in_features)
        codes = start.codes.float()
        return torch.maximum(torch.minimum((units - first) / step, codes + CELL), codes - CELL)

    def _line(self) -> tuple[float, float]:
        first = self.format.levels[0][0]
        return first, self.format.levels[1][0] - first

    def _stored_scales(self) -> Tensor:
        scales = self.start_scales * self.factors
        return scales + (scales.half().float() - scales).detach()

    def _stored_zeros(self) -> Tensor | None:
        if self.zeros is None:
            return None
        step = self.format.zero_step
        return self.zeros + ((self.zeros / step).round().clamp(0, 255) * step - self.zeros).detach()

    def _units(self) -> Tensor:
        """The level of every weight, (out_features, in_features, n_terms), with the gradient to its code."""
        if not self.is_code_trained or self.format.n_terms > 1:
            return self.levels[self._hard_codes().long()]
        first, step = self._line()
        hard = self._hard_codes()
        if self.shifts is None and self.sharpness is None:
            ramp = self.latents.clamp(0, self.format.n_levels - 1)
            return (first + step * (ramp + (hard - ramp).detach()))[..., None]
        distance = self._distances()
        if self.sharpness is not None:
            return (first + step * torch.sigmoid(self.sharpness * distance).sum(-1))[..., None]
        ramp = (distance + 0.5).clamp(0, 1).sum(-1)
        return (first + step * (ramp + (hard - ramp).detach()))[..., None]

    def _distances(self) -> Tensor:
        """How far each latent is above each threshold, (out_features, in_features, n_levels - 1)."""
        steps = torch.arange(self.format.n_levels - 1, device=self.latents.device) + 0.5
        distance = self.latents[..., None] - steps
        if self.shifts is None:
            return distance
        return distance - expand_groups(self.shifts, self.group_size, self.in_features)

    def _hard_codes(self) -> Tensor:
        if not self.is_code_trained:
            return self.codes
        if self.format.n_terms > 1:
            scales = self._stored_scales()
            values = expand_groups(scales @ self.levels.T, self.group_size, self.in_features)
            wide = expand_groups(scales, self.group_size, self.in_features)[..., 0]
            return (values - (self.latents * wide)[..., None]).abs().argmin(-1).detach()
        if self.shifts is None:
            return self.latents.detach().round().clamp(0, self.format.n_levels - 1)
        return (self._distances().detach() > 0).sum(-1).float()


def _parameter(values: Tensor, is_trained: bool) -> nn.Parameter:
    return nn.Parameter(values.detach().clone().float(), requires_grad=is_trained)
