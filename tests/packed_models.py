"""Tiny models with packed layers, made by plain rounding, and what tests ask about them."""

from itertools import cycle
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tiny_models import DUAL_ENCODERS, PLAIN_LANGUAGE, build, inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.attach import attach
from vlmq.eval.round_trip import main
from vlmq.formats import QuantizedWeight, expand_groups, n_groups
from vlmq.linear import QuantLinear
from vlmq.scheme import Scheme, parse_scheme

MIXED = (
    "int4-g32",
    "ternary-g16",
    "int3-g64",
    "binary-sym-channel",
    "int2-sym-g16",
    "ternary2-g32",
    "int8-channel",
    "binary2-g16",
    "ternary-offset-g32",
    "binary-g128",
)


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Range of each group by its extremes, then the nearest point of the grid."""
    fmt, size = scheme.format, scheme.group_size
    weight = weight.detach().float()
    out_features, in_features = weight.shape
    groups = n_groups(in_features, size)
    width = size or in_features
    padded = nn.functional.pad(weight, (0, groups * width - in_features)).unflatten(1, (groups, width))
    levels = torch.tensor(fmt.levels)  # (n_levels, n_terms)
    zeros = None
    if fmt.has_zero:
        low, high = padded.amin(2), padded.amax(2)
        scales = ((high - low) / (fmt.n_levels - 1))[..., None]
        zeros = (-low / scales[..., 0] / fmt.zero_step).round().clamp(0, 255).to(torch.uint8)
    else:
        top = levels.abs().amax(0).sum()
        scales = (padded.abs().amax(2) / top)[..., None].repeat(1, 1, fmt.n_terms)
    scales = scales.half()
    points = levels.T[None, None].expand(out_features, in_features, -1, -1)
    if zeros is not None:
        points = points - (expand_groups(zeros, size, in_features).float() * fmt.zero_step)[..., None, None]
    grid = (points * expand_groups(scales, size, in_features).float()[..., None]).sum(2)
    codes = (grid - weight[..., None]).abs().argmin(-1).to(torch.uint8)
    return QuantizedWeight(codes, scales, zeros, fmt, size)


def block_linears(model: PreTrainedModel) -> list[str]:
    """The linear layers inside the blocks: those with a number in their path."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(part.isdigit() for part in name.split("."))
    ]


def pack_layers(model: PreTrainedModel, schemes: dict[str, str]) -> None:
    """Replace the named layers by packed ones; nothing is attached yet."""
    for name, text in schemes.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = round_to_nearest(linear.weight, parse_scheme(text))
        layer = QuantLinear.from_quantized(weight, linear.bias, dtype=linear.weight.dtype)
        model.set_submodule(name, layer)


def packed(
    family: str, schemes: tuple[str, ...] = MIXED, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A model of the family with the linear layers of its blocks packed, the schemes taken in turn."""
    model = build(family, dtype)
    chosen = dict(zip(block_linears(model), cycle(schemes), strict=False))
    pack_layers(model, chosen)
    attach(model, chosen, {"seed": 0, "calibration": "none"})
    return model


def logits(model: PreTrainedModel, family: str) -> Tensor:
    batch = inputs(family, 1, dtype=model.dtype)[0]
    with torch.no_grad():
        out = model(**batch)
    return out.logits_per_image if family in DUAL_ENCODERS else out.logits


def auto_class(family: str) -> Any:
    if family in DUAL_ENCODERS:
        return transformers.AutoModel
    if family in PLAIN_LANGUAGE:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def run_here(work: str) -> CompletedProcess[str]:
    """In place of `round_trip._run_fresh`: the same in this process, seconds faster."""
    n_threads = torch.get_num_threads()
    main(Path(work))
    torch.set_num_threads(n_threads)
    return CompletedProcess([], 0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
