"""The packed linear layer on a GPU: which kernel takes which number of tokens, and the launches.

    up to MAX_FUSED_TOKENS    `triton_matmul`, one pass over the packed weight
    above, and in float32     `triton_dequant` into a workspace, then the vendor's matrix product

Everything is launched without a host read, and buffers come from torch's allocator, so a call can be captured in a
CUDA graph. Beside x and y the fused path holds splits * n_tokens * out_features float32 partial sums, the other one
WORKSPACE_BYTES of dequantized rows at most.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmq.formats import Format, get_format
from vlmq.kernels.packing import row_bytes
from vlmq.kernels.parts import Layer, by_part, checked_layers, checked_parts, rows_of
from vlmq.kernels.triton_config import (
    MAX_FUSED_TOKENS,
    MatmulConfig,
    default_matmul,
    matmul_key,
    row_unit,
    tuned_table,
)
from vlmq.kernels.triton_dequant import dequantize_kernel, dequantize_rows
from vlmq.kernels.triton_matmul import matmul_kernel, reduce_kernel

WORKSPACE_BYTES = 2**27
"""Largest buffer of dequantized weights, unless a single row is larger."""

_REDUCE_BLOCK = 512


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
    """Apply the packed linear layer.

    Args:
        x: (..., in_features) float16, bfloat16 or float32.
        qweight: (out_features, row_bytes) uint8, like the other arguments as in
            `vlmq.kernels.reference.quant_linear`.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: a tensor whose shape, dtype or device does not fit the others.
    """
    y = quant_linears(x, [(qweight, scales, zeros, bias)], format_name, in_features, group_size)
    return y.view(*x.shape[:-1], qweight.shape[0])


def quant_linears(
    x: Tensor, layers: Sequence[Layer], format_name: str, in_features: int, group_size: int
) -> Tensor:
    """Apply packed linear layers of one format to the same x, few tokens in one launch.

    Args:
        x: (..., in_features) float16, bfloat16 or float32.
        layers: what `quant_linear` takes of each.

    Returns:
        The results (n_tokens, out_features) of the layers, one after the other in one row, in the dtype of x.

    Raises:
        ValueError: a tensor whose shape, dtype or device does not fit the others, or biases that differ in dtype.
    """
    rows = rows_of("x", x, in_features)
    layers = checked_layers(layers, format_name, in_features, group_size, x.device)
    with on_device(x):
        if rows.dtype != torch.float32 and rows.shape[0] <= MAX_FUSED_TOKENS:
            return fused_linears(rows, layers, format_name, in_features, group_size)
        widths = [layer[0].shape[0] for layer in layers]
        y = torch.empty(rows.shape[0] * sum(widths), dtype=x.dtype, device=x.device)
        outs = y.split([rows.shape[0] * width for width in widths])
        for layer, out, width in zip(layers, outs, widths, strict=True):
            _dequantized_linear(rows, layer, format_name, group_size, out.view(-1, width))
    return y


def quant_linear_grad(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Gradient of the layer's input, grad @ W; (..., in_features) in the dtype of `grad`.

    Where the workspace does not hold all rows, the products of its parts are summed in float32.

    Raises:
        ValueError: a tensor whose shape, dtype or device does not fit the others.
    """
    qweight, scales, zeros, _ = checked_parts(
        (qweight, scales, zeros, None), format_name, in_features, group_size, grad.device
    )
    rows = rows_of("grad", grad, qweight.shape[0])
    step = _workspace_rows(in_features, grad.dtype)
    with on_device(grad), torch.autocast(grad.device.type, enabled=False):
        total: Tensor | None = None
        for part in _slices(qweight.shape[0], step):
            weight = _dequantize(
                qweight, scales, zeros, format_name, in_features, group_size, part, grad.dtype
            )
            product = rows[:, part] @ weight
            if step < qweight.shape[0]:
                product = product.float()
            total = product if total is None else total.add_(product)
    assert total is not None  # a layer has at least one row
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


def fused_linears(
    x: Tensor,
    layers: Sequence[Layer],
    format_name: str,
    in_features: int,
    group_size: int,
    *,
    config: MatmulConfig | None = None,
    use_assembly: bool | None = None,
) -> Tensor:
    """Multiply by packed weights in one pass.

    Args:
        x: (n_tokens, in_features) float16 or bfloat16, contiguous.
        layers: of `checked_layers`.
        config: tiles; by default those of the table for this GPU and shape.
        use_assembly: False for the plain form that the interpreter runs too; by default wherever it can be used.

    Returns:
        As `quant_linears`.
    """
    fmt = get_format(format_name)
    n_tokens, widths = x.shape[0], tuple(layer[0].shape[0] for layer in layers)
    out_features = sum(widths)
    y = torch.empty(n_tokens * out_features, dtype=x.dtype, device=x.device)
    if n_tokens == 0:
        return y
    if config is None:
        sizes = (n_tokens, out_features, in_features)
        config = choose_config(x.device, *sizes, format_name, group_size, len(layers))
    target = y
    if config.splits > 1:
        target = torch.empty(config.splits, y.numel(), dtype=torch.float32, device=x.device)
    interpreted = triton.knobs.runtime.interpret
    compute = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    if interpreted and compute == tl.bfloat16:
        compute = tl.float32
    qweights, scales, zeros, biases = by_part(layers)
    _, row_units, high_units, unit = _lanes(qweights[0], fmt, in_features)
    grid = (
        sum(triton.cdiv(width, config.block_n) for width in widths),
        triton.cdiv(n_tokens, config.block_m),
        config.splits,
    )
    matmul_kernel[grid](
        x,
        tuple(qweight.view(torch.uint16) for qweight in qweights),
        scales,
        zeros,
        biases,
        target,
        n_tokens,
        widths,
        in_features,
        row_units,
        high_units,
        UNIT=unit,
        FORMAT=kernel_format(fmt),
        GROUP=group_size,
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        BLOCKS=config.blocks,
        K_UNIT=row_unit(in_features),
        COMPUTE=compute,
        ASM=not interpreted if use_assembly is None else use_assembly,
        **launch_options(config.warps, config.stages),
    )
    if target is not y:
        sum_splits(target, y)
    return y


def fused_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
    bias: Tensor | None = None,
    *,
    config: MatmulConfig | None = None,
    use_assembly: bool | None = None,
) -> Tensor:
    """`fused_linears` of one layer; (n_tokens, out_features)."""
    layers = [(qweight, scales, zeros, bias)]
    sizes = (format_name, in_features, group_size)
    y = fused_linears(x, layers, *sizes, config=config, use_assembly=use_assembly)
    return y.view(-1, qweight.shape[0])


def _dequantized_linear(x: Tensor, layer: Layer, format_name: str, group_size: int, out: Tensor) -> None:
    """Multiply x (n_tokens, in_features) by rows that are dequantized into a workspace, as many as it holds."""
    qweight, scales, zeros, bias = layer
    in_features = x.shape[1]
    for part in _slices(qweight.shape[0], _workspace_rows(in_features, x.dtype)):
        weight = _dequantize(qweight, scales, zeros, format_name, in_features, group_size, part, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if bias is None:
                torch.mm(x, weight.T, out=out[:, part])
            else:
                torch.addmm(bias[part].to(x.dtype), x, weight.T, out=out[:, part])


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the whole matrix W, (out_features, in_features) in `dtype`, equal to `reference.dequantize`."""
    with on_device(qweight):
        rows = slice(0, qweight.shape[0])
        return _dequantize(qweight, scales, zeros, format_name, in_features, group_size, rows, dtype)


def _dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
    rows: slice,
    dtype: torch.dtype,
) -> Tensor:
    fmt = get_format(format_name)
    lanes, row_units, high_units, unit = _lanes(qweight[rows], fmt, in_features)
    out = torch.empty(lanes.shape[0], in_features, dtype=dtype, device=qweight.device)
    block_n = dequantize_rows(in_features, group_size, fmt.bits)
    dequantize_kernel[(triton.cdiv(lanes.shape[0], block_n) * triton.cdiv(in_features, 128),)](
        lanes,
        scales[rows],
        None if zeros is None else zeros[rows],
        out,
        lanes.shape[0],
        in_features,
        row_units,
        high_units,
        UNIT=unit,
        FORMAT=kernel_format(fmt),
        GROUP=group_size,
        BLOCK_N=block_n,
        K_UNIT=row_unit(in_features),
        **launch_options(4, 1),
    )
    return out


@cache
def choose_config(
    device: torch.device,
    n_tokens: int,
    out_features: int,
    in_features: int,
    format_name: str,
    group_size: int,
    n_layers: int = 1,
) -> MatmulConfig:
    """Return the tuned tiles for a product on this device, or those of the rule; looked up once for each shape."""
    fmt = get_format(format_name)
    arch = architecture(device)
    key = matmul_key(arch, n_tokens, out_features, in_features, fmt.bits, fmt.n_terms, group_size)
    return tuned_table().get(key) or default_matmul(
        arch, n_tokens, out_features, in_features, fmt, group_size, n_processors(device), n_layers
    )


def sum_splits(partial: Tensor, y: Tensor) -> None:
    """Write the sum of partial (splits, n) float32 over the splits, in order, to y (n,)."""
    n_splits, n = partial.shape
    options = launch_options(4, 1)
    reduce_kernel[(triton.cdiv(n, _REDUCE_BLOCK),)](partial, y, n, n_splits, BLOCK=_REDUCE_BLOCK, **options)


def kernel_format(fmt: Format) -> tuple[int, int, float, float]:
    """(bits, terms, first level, step of the levels); of two planes the step is that of one plane, first is unused."""
    if fmt.n_terms == 1:
        first, second = fmt.levels[0][0], fmt.levels[1][0]
        return fmt.bits, 1, first, second - first
    return fmt.bits, fmt.n_terms, 0.0, fmt.levels[1][0] - fmt.levels[0][0]


def _lanes(qweight: Tensor, fmt: Format, in_features: int) -> tuple[Tensor, int, int, int]:
    """Packed rows as (out_features, lanes) uint16; lanes of a row and before the third bits, in units; the unit."""
    lanes = qweight.view(torch.uint16)
    high = row_bytes(in_features, 2) // 2 if fmt.bits == 3 else 0
    unit = math.gcd(lanes.shape[1], high, 16)
    return lanes, lanes.shape[1] // unit, high // unit, unit


def _slices(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _workspace_rows(in_features: int, dtype: torch.dtype) -> int:
    return max(1, WORKSPACE_BYTES // (in_features * dtype.itemsize))


def launch_options(warps: int, stages: int) -> dict[str, int | bool]:
    """Options of a launch; the interpreter takes none."""
    if triton.knobs.runtime.interpret:
        return {}
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of x the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; eight stand for the interpreter's CPU."""
    return _count_processors(device) if device.type == "cuda" else 8


@cache
def architecture(device: torch.device) -> str:
    """sm_<compute capability> of a GPU, "cpu" for the interpreter's."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "cpu"


@cache
def _count_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
