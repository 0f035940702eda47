"""The operator `torch.ops.vlmq.quant_linear`, whichever backend runs it (`vlmq.kernels.backends`).

    y = x W^T + bias,    dL/dx = dL/dy W

W is given by its packed parts (see `vlmq.kernels.packing` and `vlmq.kernels.reference`). The operator is
opaque to torch.compile, knows its shapes on the meta device, and is differentiable with respect to x and
bias, so a gradient can pass through a quantized block. Scales have no gradient. Shapes and dtypes of the
parts are checked where a module is built or loaded, not at each call.
"""

from collections.abc import Sequence
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
    if torch.is_grad_enabled() and (x.requires_grad or any(p is not None and p.requires_grad for p in parts)):
        return False
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
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
