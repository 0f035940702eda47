"""Forwards of modules replaced for a while, and what a forward writes into the dicts among its arguments."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def run_with_writes(
    forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, list[dict]]:
    """Call a forward; return its output, and what it put into each dict among its arguments.

    Some families hand a dict from block to block: Gemma 4 shares keys and values among layers in that way.
    """
    shared = _dicts(args, kwargs)
    before = [dict(d) for d in shared]
    output = forward(*args, **kwargs)
    written = [
        {key: value for key, value in d.items() if key not in b or value is not b[key]}
        for d, b in zip(shared, before, strict=True)
    ]
    return output, written


def repeat_writes(written: list[dict], args: tuple, kwargs: dict[str, Any]) -> None:
    """Put into the dicts among the arguments what a stored call put there."""
    for shared, new in zip(_dicts(args, kwargs), written, strict=True):
        shared.update(new)


def _dicts(args: tuple, kwargs: dict[str, Any]) -> list[MutableMapping]:
    return [argument for argument in (*args, *kwargs.values()) if isinstance(argument, MutableMapping)]


@contextmanager
def patched(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Replace the forward of modules for a while; hooks on the modules still run."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
