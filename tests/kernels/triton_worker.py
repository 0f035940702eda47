"""What runs in the process of Triton's interpreter: kernels on CPU tensors against float64.

The variable must be set before the kernels are imported, so this module is imported in a process of its own only (the
`interpreter` fixture). The interpreter truncates where it rounds to bfloat16, a GPU rounds to nearest.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from random_weights import random_weight
from torch import Tensor

from vlmq.formats import QuantizedWeight, get_format
from vlmq.kernels import reference, triton_int8, triton_linear
from vlmq.kernels.packing import pack
from vlmq.kernels.triton_config import MatmulConfig

torch.set_num_threads(1)
_empty = torch.empty


def _poisoned_empty(*args, **kwargs) -> Tensor:
    tensor = _empty(*args, **kwargs)
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


torch.empty = _poisoned_empty


def _weight(name: str, shape: tuple[int, int], group_size: int | None, codes: str) -> QuantizedWeight:
    weight = random_weight(name, *shape, group_size)
    if codes == "largest":
        weight.codes.fill_(get_format(name).n_levels - 1)
    elif codes == "smallest":
        weight.codes.zero_()
    if codes != "random" and weight.zeros is not None:
        weight.zeros.random_(0, 2).mul_(255)
    return weight


def _arguments(weight: QuantizedWeight) -> tuple:
    tensors = (pack(weight.codes, weight.format.bits), weight.scales, weight.zeros)
    return (*tensors, weight.format.name, weight.codes.shape[1], weight.group_size or 0)


def _relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def linear_error(
    name: str,
    group_size: int | None,
    dtype: torch.dtype,
    n_tokens: int,
    shape: tuple[int, int],
    *,
    codes: str = "random",
    seed: int = 0,
    fused: tuple[int, ...] | None = None,
    has_bias: bool = True,
) -> float:
    """Relative error of one product against float64; `fused` are the tiles of the one-pass kernel, None for the
    choice of `quant_linear`."""
    torch.manual_seed(seed)
    weight = _weight(name, shape, group_size, codes)
    x = torch.randn(n_tokens, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    tensors = _arguments(weight)
    if fused is None:
        y = triton_linear.quant_linear(x, *tensors[:3], bias, *tensors[3:])
    else:
        y = triton_linear.fused_linear(x, *tensors, bias, config=MatmulConfig(*fused))
    assert (y.shape, y.dtype) == ((n_tokens, shape[0]), dtype)
    expected = x.double() @ weight.dequantize().double().T
    return _relative_error(y, expected if bias is None else expected + bias.double())


def joint_differences(
    name: str,
    group_size: int | None,
    n_tokens: int,
    widths: tuple[int, ...],
    in_features: int,
    *,
    fused: tuple[int, ...] | None = None,
    has_bias: bool = True,
    rounds: bool = False,
) -> int:
    """How many numbers of layers in one launch are not those of each layer alone, with the same tiles.

    `fused` as in `linear_error`; `rounds`: the kernels of 8-bit activations.
    """
    torch.manual_seed(0)
    x = torch.randn(n_tokens, in_features).half()
    layers = []
    for width in widths:
        weight = _arguments(_weight(name, (width, in_features), group_size, "random"))
        layers.append((*weight[:3], torch.randn(width).half() if has_bias else None))
    sizes = (name, in_features, group_size or 0)

    def run(layers: list) -> Tensor:
        if rounds:
            return triton_int8.quant_linears(x, layers, *sizes)
        if fused is None:
            return triton_linear.quant_linears(x, layers, *sizes)
        return triton_linear.fused_linears(x, layers, *sizes, config=MatmulConfig(*fused))

    together, alone = run(layers), torch.cat([run([layer]) for layer in layers])
    assert (together.shape, together.dtype) == (alone.shape, torch.half)
    assert alone.isfinite().all()
    return int((together != alone).sum())


def gradient_error(name: str, group_size: int | None, dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """Relative error of the input's gradient, with a workspace of two rows."""
    torch.manual_seed(0)
    weight = _weight(name, shape, group_size, "random")
    grad = torch.randn(2, 3, shape[0]).to(dtype)
    whole = triton_linear.WORKSPACE_BYTES
    triton_linear.WORKSPACE_BYTES = 2 * shape[1] * dtype.itemsize
    try:
        got = triton_linear.quant_linear_grad(grad, *_arguments(weight))
    finally:
        triton_linear.WORKSPACE_BYTES = whole
    assert (got.shape, got.dtype) == ((2, 3, shape[1]), dtype)
    return _relative_error(got, grad.double() @ weight.dequantize().double())


def dequantize_differences(
    name: str, group_size: int | None, dtype: torch.dtype, shape: tuple[int, int], codes: str = "random"
) -> tuple[int, float]:
    """How many weights are not the reference's, and the largest relative difference."""
    torch.manual_seed(0)
    arguments = _arguments(_weight(name, shape, group_size, codes))
    got = triton_linear.dequantize(*arguments, dtype)
    expected = reference.dequantize(*arguments, dtype)
    differs = got != expected
    ratio = ((got - expected).abs() / expected.abs())[differs]
    return int(differs.sum()), float(ratio.max()) if differs.any() else 0.0


def same_bits(
    name: str, group_size: int | None, n_tokens: int, shape: tuple[int, int], fused: tuple[int, ...]
) -> bool:
    """Whether two calls with the same input give the same bits."""
    weight = _weight(name, shape, group_size, "random")
    x = torch.randn(n_tokens, shape[1]).half()
    first, second = (
        triton_linear.fused_linear(x, *_arguments(weight), config=MatmulConfig(*fused)) for _ in range(2)
    )
    return torch.equal(first, second)


def int8_error(
    name: str,
    group_size: int | None,
    dtype: torch.dtype,
    n_tokens: int,
    shape: tuple[int, int],
    codes: str = "random",
) -> float:
    """Relative error of decoding with 8-bit activations against float64 with the same rounded activations."""
    torch.manual_seed(0)
    weight = _weight(name, shape, group_size, codes)
    x = torch.randn(n_tokens, shape[1]).to(dtype)
    x[0, 3:5] = 0
    bias = torch.randn(shape[0]).to(dtype)
    tensors = _arguments(weight)
    y = triton_int8.quant_linear(x, *tensors[:3], bias, *tensors[3:])
    assert (y.shape, y.dtype) == ((n_tokens, shape[0]), dtype)
    largest = x.float().abs().amax(1, keepdim=True)
    rounded = (x.float() * (127 / largest) + 0.5).floor().double() * (largest.double() / 127)
    return _relative_error(y, rounded @ weight.dequantize().double().T + bias.double())


def int8_of_unusual(value: float) -> Tensor:
    """The layer applied to two tokens, of which the first holds the value."""
    tensors = _arguments(_weight("ternary", (9, 128), None, "random"))
    x = torch.ones(2, 128)
    x[0, 77] = value
    return triton_int8.quant_linear(x, *tensors[:3], None, *tensors[3:])


def int8_of_zeros(name: str) -> bool:
    """Whether a token of zeros gives the bias, and no division by zero."""
    weight = _weight(name, (9, 128), None, "random")
    bias = torch.randn(9)
    tensors = _arguments(weight)
    y = triton_int8.quant_linear(torch.zeros(1, 128), *tensors[:3], bias, *tensors[3:])
    return torch.equal(y[0], bias)
