"""A device that no machine has: tensors that hold their values on the CPU, say they are elsewhere, and refuse to mix.

As a GPU would, it stops two devices in one operator, a generator of the other device and `.numpy()` without `.cpu()`:
a run on it shows what a run on a GPU would trip over. Kernels, streams and memory are not pretended. It registers a
backend with torch for good, so it is imported in a process of its own (`other_device_worker`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("other")
OTHER = torch.device("other", 0)
COPIES = {"copy_", "_to_copy", "_copy_from", "lift_fresh", "detach"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operators that take indices of the CPU."""


class Elsewhere(Tensor):
    """A tensor that says it is on the other device, around its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        """Wrap values of the CPU."""
        sizes = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), **sizes, device=OTHER)
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copy = nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> "Elsewhere":
        return Elsewhere(inner["held"])

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of another device to numpy; use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class OtherGenerator(torch.Generator):
    """A generator of the CPU that remembers which device it was asked for."""

    elsewhere: set[int] = set()

    def __new__(cls, device: Any = "cpu") -> "OtherGenerator":
        """Make one for a device."""
        made = super().__new__(cls)
        (cls.elsewhere.add if torch.device(device).type == "other" else cls.elsewhere.discard)(made._cdata)
        return made


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, after looking where its arguments are.

    Raises:
        RuntimeError: they are on two devices, or the generator is on another than the result.
    """
    name = func.overloadpacket.__name__
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    wanted = kwargs.get("device")
    goes_there = any(isinstance(t, Elsewhere) for t in tensors)
    if wanted is not None:
        goes_there = torch.device(wanted).type == "other"
        kwargs = kwargs | ({"device": torch.device("cpu")} if goes_there else {})
    if name == "copy_":
        goes_there = isinstance(tensors[0], Elsewhere)
    elif name not in COPIES:
        _refuse_mixture(func, tensors[:1] if name in INDEXING else tensors)
        for leaf in leaves:
            if (
                isinstance(leaf, torch._C.Generator)
                and (leaf._cdata in OtherGenerator.elsewhere) != goes_there
            ):
                raise RuntimeError(f"{func}: the generator is on another device than the result")
    if name == "_fused_sdp_choice":
        return 0  # the plain form: the others are kernels of a device
    bare_args, bare_kwargs = tree_map(lambda t: t.held if isinstance(t, Elsewhere) else t, (args, kwargs))
    given = {id(t.held): t for t in tensors if isinstance(t, Elsewhere)}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            return leaf
        return given[id(leaf)] if id(leaf) in given else Elsewhere(leaf) if goes_there else leaf

    return tree_map(wrapped, func(*bare_args, **bare_kwargs))


def _refuse_mixture(func: Any, tensors: list[Tensor]) -> None:
    # Single values of the CPU are welcome everywhere.
    if len({t.device for t in tensors if t.ndim > 0 or isinstance(t, Elsewhere)}) > 1:
        seen = [(tuple(t.shape), str(t.device)) for t in tensors]
        raise RuntimeError(f"{func}: expected all tensors on the same device, got {seen}")


# What torch calls beneath its dispatch to Python, where it makes a tensor of a list of indices or a number of a tensor.
_beneath = torch.library.Library("aten", "IMPL")


def _empty_strided(size: Any, stride: Any, *, dtype: torch.dtype, **_: Any) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    values, into = (t.held if isinstance(t, Elsewhere) else t for t in (source, target))
    into.copy_(values)
    return target


_beneath.impl("empty_strided", _empty_strided, "PrivateUse1")
_beneath.impl("_copy_from", _copy_from, "PrivateUse1")
_beneath.impl("_local_scalar_dense", lambda tensor: tensor.held.item(), "PrivateUse1")


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Let the device be used; yields it."""
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
        place = OTHER if device is not None and torch.device(device).type == "other" else "cpu"
        return make(data, **options).to(place).requires_grad_(requires_grad)

    with (
        patch.object(torch, "tensor", tensor),
        patch.object(torch, "Generator", OtherGenerator),
        _Factories(),
    ):
        yield OTHER
