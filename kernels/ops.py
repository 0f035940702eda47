"""The operators `torch.ops.vlmq.quant_linear` and `quant_linears`, whichever backend (`vlmq.kernels.backends`) runs.

    y = x W^T + bias,    dL/dx = dL/dy W

W is given by its packed parts (see `vlmq.kernels.packing` and `vlmq.kernels.reference`). The operator is
opaque to torch.compile, knows its shapes on the meta device, and is differentiable with respect to x and
bias, so a gradient can pass through a quantized block. Scales have no gradient. Shapes and dtypes of the
parts are checked where a module is built or loaded, not at each call.

`quant_linears` applies several layers to the same x, in one launch where the backend can; it has no gradient.
"""

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmq.kernels.backends import BoundLayer, choose_backend

Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def runs_plainly(x: Tensor, parts: Sequence[Tensor | None]) -> bool:
    """Say whether nothing but the result is wanted: no gradient, graph, trace, transform or mode sees the call.

    Then a layer may call a backend itself. It is asked at each call, so the cheapest questions come first.
    """
    return (
        not wants_gradient(x, parts)
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def wants_gradient(x: Tensor, parts: Sequence[Tensor | None]) -> bool:
    """Say whether a gradient is to pass through a layer."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in parts)
    )


def bind(x: Tensor, parts: Parts, format_name: str, in_features: int, group_size: int) -> BoundLayer | None:
    """Return the layer as the chosen backend's function of x; None if that backend has no such form.

    It does not hold the tensors, so that a model whose weights come and go keeps none of them: before each call,
    whoever has them asks `takes`.
    """
    backend = choose_backend(x, format_name, in_features, group_size)
    if backend.bind is None:
        return None
    bound = backend.bind(*parts, format_name, in_features, group_size)
    bound.let_go()
    return bound


@torch.library.custom_op("vlmq::quant_linear", mutates_args=(), device_types=("cpu", "cuda"))
def quant_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Apply a packed linear layer; arguments and result as in `vlmq.kernels.reference.quant_linear`."""
    backend = choose_backend(x, format_name, in_features, group_size)
    return backend.forward(x, qweight, scales, zeros, bias, format_name, in_features, group_size)


@quant_linear.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.custom_op("vlmq::quant_linears", mutates_args=(), device_types=("cpu", "cuda"))
def quant_linears(
    x: Tensor,
    qweights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor],
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Apply packed linear layers of one format to the same x.

    Args:
        x: (..., in_features).
        qweights, scales, zeros, biases: of each layer, as in `vlmq.kernels.reference.quant_linear`; of zero points and
            biases an entry for each layer, or none.
        format_name, in_features, group_size: of all of them.

    Returns:
        The results (n_tokens, out_features) of the layers, one after the other in one row, in the dtype of x.
    """
    backend = choose_backend(x, format_name, in_features, group_size)
    layers = list(zip(qweights, scales, zeros or repeat(None), biases or repeat(None)))  # noqa: B905  some are endless
    if backend.forward_all is not None:
        return backend.forward_all(x, layers, format_name, in_features, group_size)
    results = [backend.forward(x, *layer, format_name, in_features, group_size) for layer in layers]
    return torch.cat([y.reshape(-1) for y in results])


@quant_linears.register_fake
def _(
    x: Tensor,
    qweights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor],
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]) * sum(qweight.shape[0] for qweight in qweights))


@torch.library.custom_op("vlmq::quant_linear_grad", mutates_args=(), device_types=("cpu", "cuda"))
def quant_linear_grad(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Gradient of the input of a packed linear layer; as in `vlmq.kernels.reference.quant_linear_grad`."""
    backend = choose_backend(grad, format_name, in_features, group_size)
    return backend.grad(grad, qweight, scales, zeros, format_name, in_features, group_size)


@quant_linear_grad.register_fake
def _(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scales, zeros, bias, *sizes = inputs
    if ctx.needs_input_grad[2]:
        raise RuntimeError(
            "quant_linear has no gradient for its scales; call requires_grad_(False) on them, "
            "or train on dequantize()"
        )
    ctx.save_for_backward(qweight, scales, zeros)
    ctx.sizes = sizes
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.vlmq.quant_linear_grad(grad, *ctx.saved_tensors, *ctx.sizes)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


quant_linear.register_autograd(_backward, setup_context=_setup_context)
