"""Options by name: read from the command line as NAME=JSON, and checked against the types that they are declared with.

What takes options declares them once, as keyword arguments or fields with a type; the table of known types here is
all that a declaration may use.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    float | None: "a finite number or null",
    tuple[float, ...]: "a list of finite numbers",
}


def parse_options(texts: Iterable[str], *, flag: str = "--option") -> dict[str, Any]:
    """Read NAME=JSON, such as 'damp=0.05', 'act_order=false' or 'scale_factors=[1, 0.9]'.

    Raises:
        ValueError: no name, no JSON, or a name that is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"{flag} {text!r}: expected NAME=JSON, such as {flag} damp=0.05")
        if name in options:
            raise ValueError(f"{flag} {text!r}: {name} is given twice; give it once")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            known = 'a number, true, false, null, a list as [1, 0.9] or a text as "data"'
            raise ValueError(f"{flag} {text!r}: {value!r} is no JSON; expected {known}") from None
    return options


def check_types(given: Mapping[str, Any], declared: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the options against their declared types; whole numbers become floats and lists tuples where declared.

    Args:
        given: name -> value.
        declared: name -> type, one of EXPECTED, of every option that there is.
        where: what takes the options, for the message (such as "solver 'gptq'").

    Raises:
        ValueError: an option that is not declared.
        TypeError: a value of another type.
    """
    unknown = sorted(given.keys() - declared.keys())
    if unknown:
        known = f"known: {' '.join(sorted(declared))}" if declared else "it has no options"
        raise ValueError(f"{where} takes no {', '.join(unknown)}; {known}")
    for name, value in given.items():
        if not _fits(value, declared[name]):
            raise TypeError(
                f"{where}: option {name} expects {EXPECTED[declared[name]]}, got {json.dumps(value, default=repr)}"
            )
    return {name: _converted(value, declared[name]) for name, value in given.items()}


def _fits(value: Any, kind: Any) -> bool:
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind == tuple[float, ...]:
        return isinstance(value, list | tuple) and len(value) > 0 and all(_fits(v, float) for v in value)
    if kind == float | None and value is None:
        return True
    allowed = int if kind is int else int | float
    return isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)


def _converted(value: Any, kind: Any) -> Any:
    if kind == tuple[float, ...]:
        return tuple(float(v) for v in value)
    return float(value) if kind in (float, float | None) and value is not None else value
