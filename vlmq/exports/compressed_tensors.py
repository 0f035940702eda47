"""Export to compressed-tensors "pack-quantized": what transformers, vLLM and SGLang load.

    W[o, i] = weight_scale[o, g(i)] (v[o, i] - weight_zero_point[o, g(i)])

    weight_packed      (out_features, ceil(in_features b / 32)) int32   v + 2^(b-1), a stream of bits along the inputs
    weight_scale       (out_features, n_groups) float16                 (out_features, 1) for whole channels
    weight_zero_point  (ceil(out_features b / 32), n_groups) int32      the same stream along the outputs; or none
    weight_shape       (2,) int64

Layout as compressed-tensors 0.20 reads it. Lossless: whatever `vlmq.exports.grid` can write on whole numbers, in 2 to 8
bits (a binary layer takes 2). Groups have one size, so a shorter last group makes all of them smaller. Layers that vLLM
fuses are given the same bits and groups, which changes no value.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmq.exports import experts
from vlmq.exports.grid import IntegerGrid, share, whole_groups
from vlmq.exports.naming import fused_groups, ignore_list, inside, name_pattern
from vlmq.words import to_words

Spec = tuple[int, bool, int | None]


def write_layer(grid: IntegerGrid) -> dict[str, Tensor]:
    """The tensors of one layer."""
    origin = 2 ** (grid.bits - 1)
    tensors = {
        "weight_packed": to_words(grid.values + origin, grid.bits),
        "weight_scale": grid.scales.contiguous(),
        "weight_shape": torch.tensor(grid.values.shape, dtype=torch.int64),
    }
    if grid.zeros is not None:
        tensors["weight_zero_point"] = to_words((grid.zeros + origin).T, grid.bits).T.contiguous()
    return tensors


def align(grids: Mapping[str, IntegerGrid], kept: list[str]) -> tuple[dict[str, IntegerGrid], list[str]]:
    """Give groups of one size to each layer, and one scheme to layers that are fused elsewhere.

    Returns:
        the grids, and notes on what another engine will not take.
    """
    aligned = {name: whole_groups(grid) for name, grid in grids.items()}
    groups, torn = fused_groups(list(aligned), kept)
    for group in groups:
        aligned |= dict(zip(group, share([aligned[name] for name in group]), strict=True))
    aligned = experts.align(aligned)
    if not torn:
        return aligned, []
    note = f"{len(torn)} layers such as {torn[0]} are quantized but not the layers that vLLM fuses them with"
    return aligned, [f"{note}: vLLM refuses this"]


def config_block(
    grids: Mapping[str, IntegerGrid], kept: list[str], kept_experts: list[str], disk: Mapping[str, str]
) -> dict[str, Any]:
    """The `quantization_config`: one group of layers for each scheme, and what is ignored.

    Args:
        grids: the layers, by their names in memory.
        kept: layers in full precision, with the matrices that choose experts: engines make linear layers of them.
        kept_experts: modules of fused experts in full precision.
        disk: names on disk of all of them.
    """
    by_spec: dict[Spec, list[str]] = {}
    for name, grid in grids.items():
        by_spec.setdefault((grid.bits, grid.zeros is None, grid.group_size), []).append(name)
    groups: dict[str, Any] = {}
    for i, ((bits, is_symmetric, group_size), names) in enumerate(by_spec.items()):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(by_spec) == 1 else _targets(names, disk),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": is_symmetric,
                "strategy": "channel" if group_size is None else "group",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    ignored = ignore_list(kept, {name: disk[name] for name in grids}, disk)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*ignored, *(inside(path, disk) for path in kept_experts)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(names: list[str], disk: Mapping[str, str]) -> list[str]:
    """What matches these layers; of experts, which share a scheme, all those of a module by one pattern."""
    paths = [layer[1] if (layer := experts.LAYER.match(name)) else None for name in names]
    known = {**disk, **{path: experts.path_on_disk(path, disk) for path in paths if path is not None}}
    found = [
        name_pattern(name, disk) if path is None else inside(path, known)
        for name, path in zip(names, paths, strict=True)
    ]
    return list(dict.fromkeys(found))
