"""The parts of a packed layer must have the sizes that a kernel, which sees addresses only, will read."""

import torch
from torch import Tensor

from vlmq.formats import Format
from vlmq.formats import n_groups as count_groups
from vlmq.kernels.packing import row_bytes

BIAS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
