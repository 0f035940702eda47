"""Export to GPTQ, version 1: what GPTQModel, vLLM and SGLang load.

    W[o, i] = scales[g(i), o] (c[o, i] - z[g(i), o])        c = v + 2^(b-1), z likewise

    qweight  (in_features b / 32, out_features) int32     c, a stream of bits along the inputs
    qzeros   (n_groups, out_features b / 32) int32        z - 1, the same stream along the outputs
    scales   (n_groups, out_features) float16
    g_idx    (in_features,) int32                         i // group_size

One width and one group size hold for the whole model, so layers that need less are written wider and in smaller
groups, which changes no value. Sizes must be multiples of 32. Zero points of 0 would be stored as -1, which readers
take in different ways: they are refused.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmq.exports.grid import IntegerGrid, ShapeError, integer_grid, share, whole_groups
from vlmq.formats import QuantizedWeight
from vlmq.words import to_words

WIDTHS = (2, 3, 4, 8)


def gptq_grid(weight: QuantizedWeight) -> IntegerGrid:
    """Write a weight on a grid that GPTQ can say.

    Raises:
        ValueError: it cannot; the message says why. ShapeError where no numbers of these sizes can be said.
    """
    out_features, in_features = weight.codes.shape
    if in_features % 32 or out_features % 32:
        raise ShapeError(f"its sizes ({out_features}, {in_features}) are no multiples of 32")
    grid = integer_grid(weight)
    if grid.zeros is not None and bool((grid.zeros == -(2 ** (grid.bits - 1))).any()):
        raise ValueError("some zero points are 0, which version 1 would store as -1")
    return grid


def align(grids: Mapping[str, IntegerGrid]) -> dict[str, IntegerGrid]:
    """The same width and groups for all layers."""
    shared = share([whole_groups(grid) for grid in grids.values()])
    return dict(zip(grids, shared, strict=True))


def write_layer(grid: IntegerGrid) -> dict[str, Tensor]:
    """The tensors of one layer."""
    origin = 2 ** (grid.bits - 1)
    width = grid.values.shape[1]
    zeros = torch.zeros_like(grid.scales, dtype=torch.int16) if grid.zeros is None else grid.zeros
    return {
        "qweight": to_words(grid.values + origin, grid.bits).T.contiguous(),
        "qzeros": to_words((zeros + origin - 1).T, grid.bits),
        "scales": grid.scales.T.contiguous(),
        "g_idx": (torch.arange(width) // (grid.group_size or width)).int(),
    }


def config_block(grids: Mapping[str, IntegerGrid], kept: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config`.

    Args:
        grids: the layers, all of one width and group size.
        kept: {name in memory: name on disk} of linear layers in full precision.
    """
    first = next(iter(grids.values()))
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": first.bits,
        "group_size": first.group_size or -1,
        "sym": first.zeros is None,
        "desc_act": False,
        "lm_head": False,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in kept.values()},
    }
