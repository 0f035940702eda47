"""The tables of solvers and refinements, and the running of a recipe such as "gptq+cd"."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmq.formats import Format, QuantizedWeight
from vlmq.registry import Registry

SOLVERS = Registry(
    "solver",
    {
        "rtn": "vlmq.solvers.rtn:solve",
        "kmeans": "vlmq.solvers.rtn:solve_kmeans",
        "gptq": "vlmq.solvers.gptq:solve",
        "cd": "vlmq.solvers.cd:solve",
        "ternary": "vlmq.solvers.lowbit:solve_ternary",
        "binary": "vlmq.solvers.lowbit:solve_binary",
    },
)
REFINEMENTS = Registry("refinement", {"cd": "vlmq.solvers.cd:refine"})

DEFAULT_RECIPES = {"int8": "gptq", "int8-sym": "gptq"}


def default_solver(format: Format) -> str:
    """The recipe used when none is named."""
    return DEFAULT_RECIPES.get(format.name, "gptq+cd")


def steps(recipe: str) -> list[tuple[str, Callable[..., QuantizedWeight]]]:
    """The functions of a recipe, the solver first.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    first, *rest = recipe.split("+")
    return [(first, SOLVERS[first]), *((name, REFINEMENTS[name]) for name in rest)]


def split_options(recipe: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Give each step of a recipe the options that it takes; an option that two steps take goes to both.

    Raises:
        ValueError: an option that no step takes.
    """
    shared = {"weight", "target", "hessian", "format", "group_size", "quantized", "generator"}
    taken = []
    for _, function in steps(recipe):
        names = inspect.signature(function).parameters.keys() - shared
        taken.append({name: value for name, value in options.items() if name in names})
    unused = options.keys() - {name for step in taken for name in step}
    if unused:
        known = sorted({n for _, f in steps(recipe) for n in inspect.signature(f).parameters} - shared)
        raise ValueError(f"solver {recipe!r} takes no {', '.join(sorted(unused))}; known: {' '.join(known)}")
    return taken


def run_recipe(
    recipe: str,
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator,
    options: dict[str, Any],
) -> QuantizedWeight:
    """Run a solver and its refinements.

    Args:
        recipe: names joined by "+".
        weight: (out_features, in_features) float32.
        target: (out_features, in_features) float32.
        hessian: (in_features, in_features) float32.
        format: the weight format.
        group_size: weights per group, None per channel.
        generator: the only source of randomness.
        options: keyword options of the solver and the refinements.
    """
    (_, solve), *refinements = steps(recipe)
    own, *others = split_options(recipe, options)
    quantized = solve(weight, target, hessian, format, group_size, generator=generator, **own)
    for (_, refine), given in zip(refinements, others, strict=True):
        quantized = refine(quantized, target, hessian, **given)
    return quantized
