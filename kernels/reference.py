"""The packed linear layer in plain PyTorch: the specification that every other backend is tested against.

    y[n, o] = sum_i x[n, i] W[o, i] + bias[o]
    W[o, i] = sum_t s[o, g(i), t] (L[q[o, i], t] - z[o, g(i)])

W is computed in float32 from the packed codes, exactly as `QuantizedWeight.dequantize` does, and rounded once
to the dtype of x; products are summed in float32, and y has the dtype of x, under autocast too.

W never exists as a whole: rows are taken `CHUNK_WEIGHTS` weights at a time. At the peak, beside the arguments
and the result, there are at most

    max(CHUNK_WEIGHTS, in_features) (10 + 12 (n_terms - 1)) bytes

(codes, W in float32, and the chunk before it; a format of two planes adds indices and a plane in float32), and for
float16 on a CPU a float32 copy of x.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from vlmq.formats import Format, get_format
from vlmq.kernels.packing import unpack

CHUNK_WEIGHTS = 2**20


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
        x: (..., in_features) float32, bfloat16 or float16.
        qweight: (out_features, row_bytes) uint8, packed codes.
        scales: (out_features, n_groups, n_terms) float16.
        zeros: (out_features, n_groups) uint8, None for formats without a zero point.
        bias: (out_features,) floating, or None.
        format_name: name of the format.
        in_features: number of weights in a row.
        group_size: weights per group, 0 for one group per channel.

    Returns:
        (..., out_features) in the dtype of x.
    """
    out = torch.empty(*x.shape[:-1], qweight.shape[0], dtype=x.dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        wide = _matmul_operand(x)
        for rows, weight in _row_chunks(
            qweight, scales, zeros, format_name, in_features, group_size, x.dtype
        ):
            part = None if bias is None else bias[rows].to(wide.dtype)
            out[..., rows] = functional.linear(wide, weight.to(wide.dtype), part)
    return out


def quant_linear_grad(
    grad: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Gradient of the layer's input, grad @ W.

    Args:
        grad: (..., out_features), gradient of the output.
        qweight: as in `quant_linear`, like the other arguments.

    Returns:
        (..., in_features) in the dtype of `grad`; the chunks of rows are summed in float32.
    """
    total = grad.new_zeros(
        *grad.shape[:-1], in_features, dtype=torch.promote_types(grad.dtype, torch.float32)
    )
    with torch.autocast(grad.device.type, enabled=False):
        wide = _matmul_operand(grad)
        for rows, weight in _row_chunks(
            qweight, scales, zeros, format_name, in_features, group_size, grad.dtype
        ):
            total += wide[..., rows] @ weight.to(wide.dtype)
    return total.to(grad.dtype)


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the whole matrix W, (out_features, in_features) in `dtype`, computed in float32."""
    weight = torch.empty(qweight.shape[0], in_features, dtype=dtype, device=qweight.device)
    for rows, part in _row_chunks(qweight, scales, zeros, format_name, in_features, group_size, dtype):
        weight[rows] = part
    return weight


def _matmul_operand(x: Tensor) -> Tensor:
    """Return x as the matrix product takes it; float16 products are very slow on a CPU, so float32 there."""
    return x.float() if x.dtype == torch.float16 and x.device.type == "cpu" else x


def _row_chunks(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """Dequantize chunk by chunk: (slice of the rows, (n_rows, in_features) in `dtype`)."""
    fmt = get_format(format_name)
    n_rows = max(1, CHUNK_WEIGHTS // in_features)
    for start in range(0, qweight.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        codes = unpack(qweight[rows], fmt.bits, in_features)
        part = None if zeros is None else zeros[rows]
        yield rows, _dequantize_codes(codes, scales[rows], part, fmt, group_size or in_features).to(dtype)


def _dequantize_codes(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format, group_size: int
) -> Tensor:
    """Evaluate the formula of W for codes (n_rows, in_features); all but the scaling is exact in float32."""
    if fmt.n_terms == 1:
        weight = codes.float()
        first, step = _line(fmt)
        if step != 1:
            weight *= step
        centre = torch.full_like(scales[:, :, 0], -first, dtype=torch.float32)  # (n_rows, n_groups)
        if zeros is not None:
            centre += zeros.float() * fmt.zero_step
        _each_group(weight, centre, group_size, Tensor.sub_)
        _each_group(weight, scales[:, :, 0].float(), group_size, Tensor.mul_)
        return weight
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=codes.device)  # (n_levels, n_terms)
    index = codes.flatten().int()
    weight = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
    for t in range(fmt.n_terms):
        term = levels[:, t].index_select(0, index).view_as(weight)
        _each_group(term, scales[:, :, t].float(), group_size, Tensor.mul_)
        weight += term
    return weight


def _each_group(
    weight: Tensor, values: Tensor, group_size: int, apply: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Apply an in-place operation with each group's value (n_rows, n_groups); the last may be shorter."""
    n_whole = weight.shape[1] // group_size
    apply(weight[:, : n_whole * group_size].unflatten(1, (n_whole, group_size)), values[:, :n_whole, None])
    if n_whole < values.shape[1]:
        apply(weight[:, n_whole * group_size :], values[:, n_whole:])


def _line(fmt: Format) -> tuple[float, float]:
    """First level and step of a format of one term; the levels of all of them are evenly spaced."""
    first, second = fmt.levels[0][0], fmt.levels[1][0]
    return first, second - first
