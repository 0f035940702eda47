"""Scheme: the recipe of one layer, and the parser of its short name.

`"int2-g64"` is format int2 in groups of 64, `"ternary-channel"` one group per output channel, `"int4-sym"`
the symmetric int4 in the default group size.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from vlmq.formats import FORMATS, GROUP_SIZES, Format, get_format

DEFAULT_GROUP_SIZE = 128


@dataclass(frozen=True)
class Scheme:
    """One layer's recipe: format, group size (None is per channel), solver and the solver's options."""

    format: Format
    group_size: int | None = DEFAULT_GROUP_SIZE
    solver: str | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The short name that `parse_scheme` reads back."""
        return f"{self.format.name}-{'channel' if self.group_size is None else f'g{self.group_size}'}"


def parse_scheme(text: str | Scheme, *, where: str = "scheme") -> Scheme:
    """Read `"<format>"`, `"<format>-g<size>"` or `"<format>-channel"`.

    Args:
        text: the short name; a Scheme is returned as it is.
        where: what the name belongs to, for the message (such as "override 'visual.*'").

    Raises:
        ValueError: unknown format or a group size that is not offered; the message lists what is.
    """
    if isinstance(text, Scheme):
        return text
    if not isinstance(text, str):
        raise TypeError(f"{where}: expected a name such as 'int4-g64' or a Scheme, got {type(text).__name__}")
    match = re.fullmatch(r"(?P<format>.+?)(?:-(?P<group>g\d+|channel))?", text.strip())
    name = match["format"] if match else text
    if name not in FORMATS:
        raise ValueError(f"{where}: format {name!r} of {text!r} is unknown; known: {' '.join(FORMATS)}")
    group = match["group"] if match else None
    size = DEFAULT_GROUP_SIZE if group is None else None if group == "channel" else int(group[1:])
    if size not in GROUP_SIZES:
        offered = ", ".join("channel" if g is None else f"g{g}" for g in GROUP_SIZES)
        raise ValueError(f"{where}: group size {size} of {text!r} is not offered; offered: {offered}")
    return Scheme(get_format(name), size)
