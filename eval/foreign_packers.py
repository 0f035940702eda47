"""Layers that GPTQModel's own packers for GPTQ and AWQ wrote, read by vlmq: imports tested on another's files.

W  --GPTQModel-->  qweight, qzeros, scales  --vlmq.foreign-->  W'
"""

from dataclasses import replace

import torch
from torch import nn

from vlmq.foreign import read_awq, read_gptq
from vlmq.formats import QuantizedWeight


def read_back(weight: QuantizedWeight) -> float:
    """Pack a weight in both formats with GPTQModel, read both with vlmq: the largest difference.

    Args:
        weight: `int4`, groups of one size; its zero points are first brought down to a level each.

    Raises:
        ValueError: another format, or a packer that wrote no codes.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # pyright: ignore[reportMissingImports]
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # pyright: ignore[reportMissingImports]

    if weight.zeros is None or weight.format.bits != 4:
        raise ValueError(f"expected int4 with zero points, got {weight.format.name}")
    step = round(1 / weight.format.zero_step)
    weight = replace(weight, zeros=weight.zeros // step * step)
    assert weight.zeros is not None
    dense = weight.dequantize()
    out_features, in_features = dense.shape
    size = weight.group_size
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = dense
    scales = weight.scales[..., 0].float()
    zeros = weight.zeros.float() / step
    g_idx = (torch.arange(in_features) // (size or in_features)).int()
    largest = 0.0
    for kind, read in ((TorchLinear, read_gptq), (AwqTorchLinear, read_awq)):
        other = kind(
            bits=4,
            group_size=size,
            sym=False,
            desc_act=False,
            in_features=in_features,
            out_features=out_features,
            register_buffers=False,
        )
        other.pack(linear, scales, zeros, g_idx)
        tensors = {leaf: getattr(other, leaf) for leaf in ("qweight", "qzeros", "scales")}
        # GPTQModel packs version 2 of GPTQ: zero points as they are. It takes one off as it saves version 1.
        again = read(tensors, in_features, 4, **({"zero_offset": 0} if read is read_gptq else {}))
        if not bool(again.codes.any()):
            raise ValueError(f"{kind.__name__} packed zeros only")
        largest = max(largest, float((again.dequantize() - dense).abs().max()))
    return largest
