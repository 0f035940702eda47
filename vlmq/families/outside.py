"""Parameters outside of linear layers: embeddings, convolutions, experts of other layouts, and what is left."""

from collections.abc import Collection

from torch import nn

from vlmq.families.experts import is_fused
from vlmq.families.packed import is_packed

EMBEDDINGS = "embeddings"
CONVOLUTIONS = "convolutions"
OTHER_EXPERTS = "experts of a layout that cannot be quantized"
THE_REST = "norms, biases and other parameters"
CONVOLUTION = (nn.modules.conv._ConvNd,)


def is_foreign_expert(module: nn.Module, path: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter, at `path`, holds experts, but none that `vlmq.families.experts` takes apart."""
    if isinstance(module, CONVOLUTION) or is_packed(module) or is_fused(module):
        return False
    return parameter.ndim == 3 and "expert" in f"{path} {type(module).__name__}".lower()


def outside_linears(model: nn.Module, experts: Collection[str]) -> dict[str, int]:
    """Number of parameters by kind, tied ones once.

    Args:
        model: in full precision or packed.
        experts: names of the parameters that `is_foreign_expert` is true for.
    """
    counts = dict.fromkeys((EMBEDDINGS, CONVOLUTIONS, OTHER_EXPERTS, THE_REST), 0)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    seen = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - tables
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            is_code = is_packed(module) and key != "bias"
            is_matrix = is_fused(module) and parameter.ndim == 3
            if id(parameter) in seen or is_code or is_matrix:
                continue
            seen.add(id(parameter))
            kind = THE_REST
            if id(parameter) in tables:
                kind = EMBEDDINGS
            elif isinstance(module, CONVOLUTION) and key == "weight":
                kind = CONVOLUTIONS
            elif f"{name}.{key}".lstrip(".") in experts:
                kind = OTHER_EXPERTS
            counts[kind] += parameter.numel()
    return counts
