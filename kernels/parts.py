"""The parts of a packed layer must have the sizes that a kernel, which sees addresses only, will read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmq.formats import Format, get_format
from vlmq.formats import n_groups as count_groups
from vlmq.kernels.packing import row_bytes

BIAS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""(qweight, scales, zeros, bias) of a packed layer."""


def check_parts(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    fmt: Format,
    in_features: int,
    group_size: int,
    device: torch.device,
) -> None:
    """Compare what the tensors say of themselves with what the layer's sizes ask for; no value is read.

    Args:
        qweight, scales, zeros, bias: as in `vlmq.kernels.reference.quant_linear`.
        fmt: format of the layer.
        in_features: number of weights in a row.
        group_size: weights per group, 0 for one group per channel.
        device: where all of them must be.

    Raises:
        ValueError: a shape, dtype or device that is not the expected one.
    """
    out_features = qweight.shape[0] if qweight.ndim else 0
    n_groups = count_groups(in_features, group_size or None)
    expected = {
        "qweight": (qweight, (out_features, row_bytes(in_features, fmt.bits)), (torch.uint8,)),
        "scales": (scales, (out_features, n_groups, fmt.n_terms), (torch.float16,)),
        "zeros": (zeros, (out_features, n_groups) if fmt.has_zero else None, (torch.uint8,)),
        "bias": (bias, None if bias is None else (out_features,), BIAS_DTYPES),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        got = None if tensor is None else tuple(tensor.shape)
        if got != shape or (tensor is not None and (tensor.dtype not in dtypes or tensor.device != device)):
            seen = "None" if tensor is None else f"{got} {tensor.dtype} on {tensor.device}"
            where = "the CPU" if device.type == "cpu" else str(device)
            wanted = "None" if shape is None else f"{shape} {' or '.join(str(d) for d in dtypes)} on {where}"
            raise ValueError(
                f"{name} of a {fmt.name} layer with {in_features} inputs and group size {group_size} "
                f"must be {wanted}, got {seen}"
            )


def rows_of(name: str, x: Tensor, n_features: int) -> Tensor:
    """Return x (..., n_features) as (n_tokens, n_features), contiguous.

    Raises:
        ValueError: its last dimension is another.
    """
    if x.ndim == 0 or x.shape[-1] != n_features:
        raise ValueError(f"{name} must be (..., {n_features}), got {tuple(x.shape)}")
    return x.reshape(-1, n_features).contiguous()


def checked_parts(
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    format_name: str,
    in_features: int,
    group_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (qweight, scales, zeros, bias) as the kernels read them: of the sizes they assume, and contiguous.

    It costs some microseconds of the host, and nothing in a CUDA graph.

    Raises:
        ValueError: a shape, dtype or device that is not the expected one.
    """
    check_parts(*parts, get_format(format_name), in_features, group_size, device)
    qweight, scales, zeros, bias = parts
    return (
        qweight.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        None if bias is None else bias.contiguous(),
    )


def checked_layers(
    layers: Sequence[Layer], format_name: str, in_features: int, group_size: int, device: torch.device
) -> list[Layer]:
    """Return the layers as the kernels read them.

    Raises:
        ValueError: as `checked_parts`, or biases that differ in dtype, which one kernel cannot read.
    """
    dtypes = [None if bias is None else bias.dtype for _, _, _, bias in layers]
    if len(set(dtypes)) > 1:
        raise ValueError(f"biases of layers in one launch must be of one dtype, or none, got {dtypes}")
    return [checked_parts(layer, format_name, in_features, group_size, device) for layer in layers]


def by_part(
    layers: Sequence[Layer],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Return the codes of all layers, their scales, their zero points and their biases, None where they have none."""
    qweights, scales, zeros, biases = zip(*layers, strict=True)
    return qweights, scales, None if zeros[0] is None else zeros, None if biases[0] is None else biases
