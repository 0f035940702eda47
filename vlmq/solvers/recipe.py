"""The tables of solvers and refinements, and the running of a recipe such as "gptq+cd".

A recipe may end in `learned`, alone or after other names: that step works on whole blocks, after the others have solved
their layers, and is run by `vlmq.learning`; here only its options are read.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor

from vlmq.formats import Format, QuantizedWeight
from vlmq.options import check_types
from vlmq.registry import Registry
from vlmq.scheme import Scheme
from vlmq.solvers.learned import LearnedOptions

SOLVERS = Registry(
    "solver",
    {
        "rtn": "vlmq.solvers.rtn:solve",
        "kmeans": "vlmq.solvers.rtn:solve_kmeans",
        "gptq": "vlmq.solvers.gptq:solve",
        "cd": "vlmq.solvers.cd:solve",
        "ternary": "vlmq.solvers.lowbit:solve",
        "binary": "vlmq.solvers.lowbit:solve",
    },
)
REFINEMENTS = Registry("refinement", {"cd": "vlmq.solvers.cd:refine"})

# Solvers that are meant for one family of formats: those whose names begin so.
FAMILIES = {"ternary": "ternary", "binary": "binary"}
LEARNED = "learned"
DEFAULT_RECIPES = {"int8": "gptq", "int8-sym": "gptq"}


def default_solver(format: Format) -> str:
    """The recipe used when none is named."""
    return DEFAULT_RECIPES.get(format.name, "gptq+cd")


def complete(recipe: str, format: Format) -> str:
    """The recipe with its start: `learned` alone begins with the default of the format.

    Raises:
        ValueError: `learned` stands anywhere but at the end.
    """
    if recipe == LEARNED:
        return f"{default_solver(format)}+{LEARNED}"
    if LEARNED in recipe.split("+")[:-1]:
        raise ValueError(f"solver {recipe!r}: 'learned' works on whole blocks and can only come last")
    return recipe


def learned_options(scheme: Scheme) -> LearnedOptions | None:
    """The options of the step `learned` of a layer's recipe; None if it has no such step."""
    recipe = str(scheme.solver)
    if recipe.split("+")[-1] != LEARNED:
        return None
    checked = check_types(scheme.options, _declared(recipe), f"solver {recipe!r}")
    return LearnedOptions(**{n: v for n, v in checked.items() if n in get_type_hints(LearnedOptions)})


def steps(recipe: str) -> list[tuple[str, Callable[..., QuantizedWeight]]]:
    """The functions of a recipe that solve a layer, the solver first.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    first, *rest = recipe.removesuffix(f"+{LEARNED}").split("+")
    return [(first, SOLVERS[first]), *((name, REFINEMENTS[name]) for name in rest)]


def check_format(recipe: str, format: Format, *, where: str = "") -> None:
    """Check that the solver of a recipe is meant for a format.

    Args:
        recipe: names joined by "+".
        format: the weight format.
        where: what the recipe was given for, for the message (such as " (override 'vision')").

    Raises:
        ValueError: it is not.
    """
    solver = recipe.split("+")[0]
    family = FAMILIES.get(solver)
    if family is not None and not format.name.startswith(family):
        raise ValueError(
            f"solver {solver!r} solves {family} formats only, got format {format.name!r}{where}; leave the solver "
            f"out (each format then has its default, here {default_solver(format)!r}), or take a {family} format"
        )


def split_options(recipe: str, options: Mapping[str, Any], *, where: str = "") -> list[dict[str, Any]]:
    """Give each step of a recipe the options that it takes; an option that two steps take goes to both.

    Args:
        recipe: names joined by "+".
        options: name -> value.
        where: what the recipe was given for, for the message (such as " (override 'vision')").

    Raises:
        ValueError: an option that no step takes, or a number below 0.
        TypeError: a value of another type than the option's.
    """
    declared = [_options_of(function) for _, function in steps(recipe)]
    checked = check_types(options, _declared(recipe), f"solver {recipe!r}{where}")
    for name, value in checked.items():
        if min(value if isinstance(value, tuple) else (value,)) < 0:
            raise ValueError(
                f"solver {recipe!r}{where}: option {name} must not be below 0, got {options[name]}"
            )
    return [{name: value for name, value in checked.items() if name in step} for step in declared]


def _declared(recipe: str) -> dict[str, Any]:
    """All options of a recipe and their types."""
    functions = [_options_of(function) for _, function in steps(recipe)]
    if recipe.split("+")[-1] == LEARNED:
        functions.append(get_type_hints(LearnedOptions))
    return {name: kind for declared in functions for name, kind in declared.items()}


def _options_of(function: Callable[..., QuantizedWeight]) -> dict[str, Any]:
    """The keyword options of a solver or refinement and their types."""
    shared = {"weight", "target", "hessian", "format", "group_size", "quantized", "generator", "return"}
    return {name: kind for name, kind in get_type_hints(function).items() if name not in shared}


def run_recipe(
    recipe: str,
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    format: Format,
    group_size: int | None,
    *,
    generator: torch.Generator,
    options: Mapping[str, Any],
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
    check_format(recipe, format)
    (_, solve), *refinements = steps(recipe)
    own, *others = split_options(recipe, options)
    quantized = solve(weight, target, hessian, format, group_size, generator=generator, **own)
    for (_, refine), given in zip(refinements, others, strict=True):
        quantized = refine(quantized, target, hessian, **given)
    return quantized
