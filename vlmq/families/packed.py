"""What the finder must know of packed layers, so that a model that is quantized in part is still seen whole.

Families lie below `vlmq.linear`: a packed layer is known by what it declares, a `format` of `vlmq.formats`.
"""

from collections.abc import Iterator
from typing import Protocol, TypeGuard

from torch import nn

from vlmq.formats import Format
from vlmq.scheme import Scheme


class PackedLinear(Protocol):
    """A linear layer that stores codes, see `vlmq.linear.QuantLinear`."""

    in_features: int
    out_features: int
    format: Format
    group_size: int | None

    def named_parameters(self, *, recurse: bool) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module has it."""
        ...


def is_packed(module: object) -> TypeGuard[PackedLinear]:
    """Whether a module is a packed linear layer."""
    return isinstance(getattr(module, "format", None), Format)


def is_plain_or_packed(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear, no subclass, or a packed one."""
    return type(module) is nn.Linear or is_packed(module)


def scheme_name(layer: PackedLinear) -> str:
    """Short name of a packed layer's scheme."""
    return Scheme(layer.format, layer.group_size).name


def stored_bytes(layer: PackedLinear) -> int:
    """Bytes of a packed layer's tensors but the bias."""
    own = layer.named_parameters(recurse=False)
    return sum(p.numel() * p.element_size() for key, p in own if key != "bias")


def count_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once; a packed layer counts with its weights, as it did before."""
    packed = [module for module in model.modules() if is_packed(module)]
    tensors = {id(p) for m in packed for key, p in m.named_parameters(recurse=False) if key != "bias"}
    kept = sum(p.numel() for p in model.parameters() if id(p) not in tensors)
    return kept + sum(m.in_features * m.out_features for m in packed)
