"""The table's entry for the Triton kernels: why they cannot run, and the calls; triton is imported at the first one.

Triton is optional, takes a second to import, and decides at import whether it is interpreted, so nothing here imports
it before a tensor on a GPU needs it.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from vlmq.kernels.parts import Layer

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

A8_TOKENS = 4
"""Most tokens that are rounded to 8 bits: each reads all weights anew."""


def why_not(x: Tensor, format_name: str, in_features: int, group_size: int) -> str | None:
    """Return why the kernels cannot take x, None if they can; every format and group size is taken."""
    if not x.is_cuda:
        return f"runs on NVIDIA GPUs, x is on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, x is {x.dtype}"
    return _why_not_on(x.device)


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
    """Apply the packed linear layer, as `vlmq.kernels.reference.quant_linear`."""
    from vlmq.kernels import triton_linear

    return triton_linear.quant_linear(x, qweight, scales, zeros, bias, format_name, in_features, group_size)


def quant_linears(
    x: Tensor, layers: Sequence[Layer], format_name: str, in_features: int, group_size: int
) -> Tensor:
    """Apply layers of one format to the same x, as `vlmq.kernels.triton_linear.quant_linears`."""
    from vlmq.kernels import triton_linear

    return triton_linear.quant_linears(x, layers, format_name, in_features, group_size)


def quant_linear_a8(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Apply the packed linear layer to x rounded to 8 bits, where there are A8_TOKENS at most and its kernel takes the
    layer; to x as it is elsewhere."""
    layers = [(qweight, scales, zeros, bias)]
    y = quant_linears_a8(x, layers, format_name, in_features, group_size)
    return y.view(*x.shape[:-1], qweight.shape[0])


def quant_linears_a8(
    x: Tensor, layers: Sequence[Layer], format_name: str, in_features: int, group_size: int
) -> Tensor:
    """As `quant_linears`, with x rounded where `quant_linear_a8` rounds it."""
    from vlmq.kernels import triton_int8, triton_linear

    is_few = x.numel() <= A8_TOKENS * in_features
    takes = is_few and triton_int8.why_not(format_name, in_features, group_size) is None
    run = triton_int8.quant_linears if takes else triton_linear.quant_linears
    return run(x, layers, format_name, in_features, group_size)


def quant_linear_grad(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Gradient of the layer's input, as `vlmq.kernels.reference.quant_linear_grad`."""
    from vlmq.kernels import triton_linear

    return triton_linear.quant_linear_grad(grad, qweight, scales, zeros, format_name, in_features, group_size)


@cache
def _why_not_on(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "holds NVIDIA assembly, this is a ROCm build of torch"
    if find_spec("triton") is None:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    return None
