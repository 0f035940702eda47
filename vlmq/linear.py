"""QuantLinear: a linear layer that stores its weight packed.

    y = x W^T + bias        W[o, i] = sum_t s[o, g(i), t] (L[q[o, i], t] - z[o, g(i)])

    qweight  (out_features, row_bytes) uint8            codes, packed layout v1 (vlmq.kernels.packing)
    scales   (out_features, n_groups, n_terms) float16
    zeros    (out_features, n_groups) uint8             only in formats with a zero point
    bias     (out_features,) in the model's dtype       only if the layer has one

They are parameters that need no gradient, not buffers, so that transformers finds, places and offloads them
as it does any weight. `.to(dtype)`, `.half()` and the like cast the bias and what `weight` shows; the
packed tensors keep their dtypes and so their values. The layer does not train: a gradient passes through it
to x and to the bias only.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from vlmq.formats import GROUP_SIZES, Format, QuantizedWeight, n_groups
from vlmq.joint import JointLayers, joint_layers
from vlmq.kernels import reference
from vlmq.kernels.backends import BoundLayer, explain, kernel_name
from vlmq.kernels.ops import Parts, bind, quant_linear, runs_plainly
from vlmq.kernels.packing import pack, row_bytes, unpack
from vlmq.report import LayerReport
from vlmq.scheme import Scheme
from vlmq.siblings import SharedInput


class QuantLinear(nn.Module):
    """A packed linear layer; built empty (to be loaded into) or by `from_quantized`.

    `format` and `group_size` (None is one group per channel) say how the weight is stored, `dtype` is the
    floating dtype of the model around it, `report` is what quantizing it gave, None after a load.
    """

    qweight: nn.Parameter
    scales: nn.Parameter
    zeros: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        group_size: int | None,
        *,
        has_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the tensors without filling them, on `device` or where torch allocates by default.

        Raises:
            ValueError: a size below one, a group size that is not offered, a dtype that is not floating.
        """
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"in_features and out_features must be at least 1, got {in_features} and {out_features}"
            )
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group size {group_size} is not offered; offered: {GROUP_SIZES}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype of a QuantLinear must be floating, got {dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.group_size = group_size
        self.dtype = dtype
        self.report: LayerReport | None = None
        self.siblings: SharedInput | None = None
        self.joint: JointLayers | None = None
        self._bound: BoundLayer | None = None
        groups = (out_features, n_groups(in_features, group_size))
        width = row_bytes(in_features, format.bits)
        self.qweight = _empty((out_features, width), torch.uint8, device)
        self.scales = _empty((*groups, format.n_terms), torch.float16, device)
        self.register_parameter("zeros", _empty(groups, torch.uint8, device) if format.has_zero else None)
        self.register_parameter("bias", _empty((out_features,), dtype, device) if has_bias else None)

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Self:
        """Pack a quantized weight, on its device.

        Args:
            weight: codes (out_features, in_features), scales and zeros.
            bias: (out_features,) floating, or None; kept in its dtype unless `dtype` is given.
            dtype: floating dtype of the model; by default the one of the bias, float32 without a bias.

        Raises:
            ValueError: a code beyond the format's levels, or a bias of the wrong shape.
        """
        out_features, in_features = weight.codes.shape
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias must be ({out_features},), got {tuple(bias.shape)}")
        _check_codes("codes", weight.codes, weight.format)
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        layer = cls(in_features, out_features, weight.format, weight.group_size, dtype=dtype, device="meta")
        layer.qweight = _frozen(pack(weight.codes, weight.format.bits))
        layer.scales = _frozen(weight.scales)
        if weight.zeros is not None:
            layer.zeros = _frozen(weight.zeros)
        if bias is not None:
            layer.bias = _frozen(bias.to(weight.codes.device, dtype))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., in_features); the result (..., out_features) has the dtype of x.

        The operator costs more than a small product does. Where no gradient and no graph needs it, the layer
        calls its backend, whose choice and checks of the tensors it keeps for as long as the tensors stay.
        """
        own = self._parameters
        parts = own["qweight"], own["scales"], own["zeros"], own["bias"]
        siblings = self.siblings
        if runs_plainly(x, parts):
            if siblings is not None and (result := siblings.take(self, x)) is not None:
                return result
            bound = self._bound_to(x, parts)
            if bound is not None:
                return bound(x) if siblings is None else siblings.apply(self, bound, x)
        if self.joint is not None and (result := self.joint.apply(self, x)) is not None:
            return result
        return quant_linear(x, *parts, self.format.name, self.in_features, self.group_size or 0)

    def bound_to(self, x: Tensor) -> BoundLayer | None:
        """Return the layer as its backend's function of x; None where only the operator will do.

        That is where gradients or a graph are wanted, or the backend has no such form.
        """
        own = self._parameters
        parts = own["qweight"], own["scales"], own["zeros"], own["bias"]
        return self._bound_to(x, parts) if runs_plainly(x, parts) else None

    def _bound_to(self, x: Tensor, parts: Parts) -> BoundLayer | None:
        bound = self._bound
        if bound is None or not bound.takes(x, parts):
            bound = bind(x, parts, self.format.name, self.in_features, self.group_size or 0)
            self._bound = bound
        return bound

    def kernel(self) -> str:
        """Name of the kernel that the layer takes where it is now, for one token in the model's dtype."""
        x = torch.empty(1, self.in_features, dtype=self.dtype, device=self.qweight.device)
        return kernel_name(x, self.format.name, self.in_features, self.group_size or 0)

    def explain(self) -> dict[str, str | None]:
        """For each kernel, in order of preference, why the layer cannot take it; None if it can."""
        x = torch.empty(1, self.in_features, dtype=self.dtype, device=self.qweight.device)
        return explain(x, self.format.name, self.in_features, self.group_size or 0)

    def quantized_weight(self) -> QuantizedWeight:
        """Return the codes, unpacked, with the layer's own scales and zero points (not copies)."""
        codes = unpack(self.qweight.detach(), self.format.bits, self.in_features)
        zeros = None if self.zeros is None else self.zeros.detach()
        return QuantizedWeight(codes, self.scales.detach(), zeros, self.format, self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights, (out_features, in_features) in `dtype`, computed in float32."""
        return reference.dequantize(
            self.qweight.detach(),
            self.scales.detach(),
            None if self.zeros is None else self.zeros.detach(),
            self.format.name,
            self.in_features,
            self.group_size or 0,
            dtype,
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the model's dtype, computed anew at each access; for reading only.

        Model code reads `proj.weight.dtype` or `.device`, computes with it, or initializes it: here it
        meets true values, and what it writes is dropped. No parameter: it is not in the state dict and not
        counted. It costs out_features * in_features * itemsize bytes while it is held.
        """
        weight = self.dequantize(self.dtype)
        # The init functions of transformers leave tensors with this flag alone.
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    def extra_repr(self) -> str:
        """Sizes, scheme and true bits per weight."""
        bits = true_bits(self) / (self.in_features * self.out_features)
        scheme = Scheme(self.format, self.group_size).name
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, scheme={scheme}, true_bits_per_weight={bits:.3f}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bound": None}  # addresses mean nothing in a copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()
        scales = self.scales

        def keep_scales(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if tensor is scales and applied.dtype != tensor.dtype:
                return tensor.to(applied.device)
            return applied

        super()._apply(keep_scales, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        return self

    def _forget(self) -> None:
        self._bound = None
        for shared in (self.siblings, self.joint):
            if shared is not None:
                shared.forget()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._forget()
        # torch would cast a wrong dtype in silence; a missing or unknown tensor, it reports itself.
        for name, own in self.named_parameters(recurse=False):
            tensor = state_dict.get(prefix + name)
            if tensor is None:
                continue
            is_wrong_dtype = tensor.dtype != own.dtype and name != "bias"
            if tensor.shape != own.shape or is_wrong_dtype:
                raise ValueError(
                    f"{prefix}{name} must be {tuple(own.shape)} {own.dtype}, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
            if name == "qweight" and not tensor.is_meta and self.format.n_levels < 2**self.format.bits:
                _check_codes(prefix + name, unpack(tensor, self.format.bits, self.in_features), self.format)
        super()._load_from_state_dict(state_dict, prefix, *args)


def true_bits(module: QuantLinear) -> int:
    """Number of bits that the weight takes in memory: packed codes with their padding, scales and zero points."""
    parts = (module.qweight, module.scales, module.zeros)
    return sum(8 * part.numel() * part.element_size() for part in parts if part is not None)


def link_siblings(model: nn.Module) -> None:
    """Let the packed layers of each module that have equally many inputs share them, and find those of one launch."""
    for module in model.modules():
        packed = {name: child for name, child in module.named_children() if isinstance(child, QuantLinear)}
        by_width: dict[int, list[QuantLinear]] = {}
        for layer in packed.values():
            by_width.setdefault(layer.in_features, []).append(layer)
        for layers in by_width.values():
            shared = SharedInput() if len(layers) > 1 else None
            for layer in layers:
                layer.siblings, layer.joint = shared, None
        for joint in joint_layers(module, packed):
            for layer in packed.values():
                if layer in joint.layers:
                    layer.joint = joint


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _check_codes(name: str, codes: Tensor, format: Format) -> None:
    if codes.numel() and (largest := int(codes.max())) >= format.n_levels:
        raise ValueError(
            f"{name} of format {format.name} must hold codes below {format.n_levels}, got {largest}"
        )
