"""Random quantized weights: valid parts of any format, shape and group size."""

import torch

from vlmq.formats import QuantizedWeight, get_format, n_groups


def random_weight(
    format_name: str,
    out_features: int,
    in_features: int,
    group_size: int | None,
    device: torch.device | str = "cpu",
) -> QuantizedWeight:
    fmt = get_format(format_name)
    groups = (out_features, n_groups(in_features, group_size))
    codes = torch.randint(0, fmt.n_levels, (out_features, in_features), dtype=torch.uint8)
    scales = torch.randn(*groups, fmt.n_terms).mul_(0.1).half()
    zeros = torch.randint(0, 256, groups, dtype=torch.uint8).to(device) if fmt.has_zero else None
    return QuantizedWeight(codes.to(device), scales.to(device), zeros, fmt, group_size)
