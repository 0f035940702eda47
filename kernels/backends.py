"""The ordered table of implementations of the packed linear layer, and the choice among them.

An entry says in words why it cannot run on an input (`why_not`), or None if it can. The first entry that can is
taken; the last, the reference, always can. It is never taken in silence on a GPU: one warning names what each
other entry said. `explain` gives the same words to whoever asks.

To add one: a module with a `why_not` and a `forward` (and a `grad` if it has one), and a line in `BACKENDS`.
The variable VLMQ_BACKEND names one entry that is to be used whatever comes before it, for tests of each entry and for
users whose first choice misbehaves. With VLMQ_CPU_ISA (`vlmq.kernels.library`) it is all that can be set from outside.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from vlmq.kernels import cpu, reference, triton_backend

OVERRIDE = "VLMQ_BACKEND"


class BoundLayer(Protocol):
    """A layer as a function of x, which holds the layer's tensors until it is told to let them go."""

    def takes(self, x: Tensor, parts: tuple[Tensor | None, ...]) -> bool:
        """Say whether x, and (qweight, scales, zeros, bias), are what this was made for."""
        ...

    def let_go(self) -> None:
        """Hold the tensors no longer; they must be there at each call all the same."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        ...

    def join(self, others: Sequence[object]) -> Callable[[Tensor], list[Tensor]] | None:
        """Return this layer and others as one function of x; None if they do not fit together."""
        ...

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the listed rows of W."""
        ...


@dataclass(frozen=True)
class Backend:
    """One implementation.

    `why_not(x, format_name, in_features, group_size)` says why it cannot run, None if it can; of x it may look
    at shape, dtype and device. `forward` and `grad` are called as the reference's two functions are. `bind`, where
    there is one, checks the tensors of a layer (`forward`'s arguments without x) once and returns the layer as a
    function of x: what a layer calls outside of graphs and gradients, to save the costs of an operator.
    `forward_all(x, layers, format_name, in_features, group_size)`, where there is one, applies several layers (qweight,
    scales, zeros, bias) to one x in fewer steps, and returns their results one after the other in one row.
    `detail` says for a listing which variant of it this machine runs.
    """

    name: str
    why_not: Callable[[Tensor, str, int, int], str | None]
    forward: Callable[..., Tensor]
    grad: Callable[..., Tensor] = reference.quant_linear_grad
    bind: Callable[..., BoundLayer] | None = None
    forward_all: Callable[..., Tensor] | None = None
    detail: Callable[[], str] | None = None


def _runs_always(x: Tensor, format_name: str, in_features: int, group_size: int) -> str | None:
    return None


BACKENDS: tuple[Backend, ...] = (
    Backend("cpu", cpu.why_not, cpu.quant_linear, bind=cpu.bind, detail=cpu.isa_in_use),
    # It rounds prompts too, and takes what the entry before it takes: so it runs only where it is named.
    Backend(
        "cpu-a8",
        cpu.why_not,
        partial(cpu.quant_linear, rounds_prompts=True),
        bind=partial(cpu.bind, rounds_prompts=True),
        detail=cpu.isa_in_use,
    ),
    Backend(
        "triton",
        triton_backend.why_not,
        triton_backend.quant_linear,
        triton_backend.quant_linear_grad,
        forward_all=triton_backend.quant_linears,
    ),
    # It rounds activations, and takes what the entry before it takes: so it runs only where it is named.
    Backend(
        "triton-a8",
        triton_backend.why_not,
        triton_backend.quant_linear_a8,
        triton_backend.quant_linear_grad,
        forward_all=triton_backend.quant_linears_a8,
    ),
    Backend("reference", _runs_always, reference.quant_linear),
)
"""In order of preference; the last one takes everything."""


def choose_backend(x: Tensor, format_name: str, in_features: int, group_size: int) -> Backend:
    """Return the first backend that can run, or the one that VLMQ_BACKEND names.

    Args:
        x: (..., in_features), only its shape, dtype and device count.
        format_name: name of the format.
        in_features: number of weights in a row.
        group_size: weights per group, 0 for one group per channel.

    Raises:
        ValueError: VLMQ_BACKEND names no backend, or one that cannot run here.
    """
    if forced := os.environ.get(OVERRIDE):
        return _forced_backend(forced, x, format_name, in_features, group_size)
    for backend in BACKENDS[:-1]:
        if backend.why_not(x, format_name, in_features, group_size) is None:
            return backend
    if x.is_cuda:
        _warn_once(_slow_choice(explain(x, format_name, in_features, group_size)))
    if x.device.type == "cpu" and (lost := cpu.missing_library()):
        _warn_once(
            f"packed layers run in plain PyTorch, many times slower than the CPU kernels would: {lost}"
        )
    return BACKENDS[-1]


def environment_with(backend: str) -> dict[str, str]:
    """Return the environment of this process with VLMQ_BACKEND set, for a process that is to use one entry."""
    return {**os.environ, OVERRIDE: backend}


def kernel_name(x: Tensor, format_name: str, in_features: int, group_size: int) -> str:
    """Return the name of the backend that would run, with its variant: `cpu (avx2)`."""
    backend = choose_backend(x, format_name, in_features, group_size)
    return backend.name if backend.detail is None else f"{backend.name} ({backend.detail()})"


def explain(x: Tensor, format_name: str, in_features: int, group_size: int) -> dict[str, str | None]:
    """Return for each backend, in order of preference, why it cannot run; None if it can."""
    return {b.name: b.why_not(x, format_name, in_features, group_size) for b in BACKENDS}


def _forced_backend(name: str, x: Tensor, format_name: str, in_features: int, group_size: int) -> Backend:
    known = {b.name: b for b in BACKENDS}
    if name not in known:
        raise ValueError(f"{OVERRIDE}={name!r} is unknown; known: {' '.join(known)}")
    if reason := known[name].why_not(x, format_name, in_features, group_size):
        raise ValueError(f"{OVERRIDE}={name} cannot run here: {reason}; unset it to let vlmq choose")
    return known[name]


def _slow_choice(reasons: dict[str, str | None]) -> str:
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return f"packed layers run in plain PyTorch on this GPU, which is slow, as no kernel can: {said}"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
