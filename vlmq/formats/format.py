"""The weight formats as data: one formula for all of them.

    W[o, i] = sum_t s[o, g(i), t] * (L[q[o, i], t] - z[o, g(i)])

`q` is the stored code, `L` the table of levels below, `s` the float16 scales of the group g(i) = i //
group_size and `z` the zero point of the group. The zero point is an unsigned byte in fixed point, z = zeros
* 2^(bits - 8): a step of 2^(bits - 8) of a level, so the grid of int2 can stand half-way between two
levels, which an integer zero point cannot. Formats without a zero point have z = 0 and carry their centre
in the levels.

Two-plane formats have two scales a group, one for each plane; a code is the pair of the planes' codes.
"""

from dataclasses import dataclass

GROUP_SIZES: tuple[int | None, ...] = (16, 32, 64, 128, None)
"""Group sizes that the packed format offers; None is one group per output channel."""


@dataclass(frozen=True)
class Format:
    """One way to write a weight as a small integer.

    `levels[code][term]` is the multiple of scale `term` that a code stands for; `bits` is the width of a
    packed code (ternary codes are packed in two bits); `has_zero` says that each group stores a zero point.
    """

    name: str
    bits: int
    levels: tuple[tuple[float, ...], ...]
    has_zero: bool

    @property
    def n_levels(self) -> int:
        """Number of valid codes; codes at and above it never occur."""
        return len(self.levels)

    @property
    def n_terms(self) -> int:
        """Number of scales per group."""
        return len(self.levels[0])

    @property
    def zero_step(self) -> float:
        """Value of one step of the stored zero point, in levels."""
        return 2.0 ** (self.bits - 8)


def _line(n_levels: int, first: float, step: float = 1.0) -> tuple[tuple[float, ...], ...]:
    return tuple((first + step * i,) for i in range(n_levels))


def _planes(plane: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Levels of two planes; the low digit of the code is the first plane."""
    return tuple((low, high) for high in plane for low in plane)


def _int(bits: int) -> list[Format]:
    n = 2**bits
    return [
        Format(f"int{bits}", bits, _line(n, 0), True),
        Format(f"int{bits}-sym", bits, _line(n, -n // 2), False),
    ]


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *_int(8),
        *_int(4),
        *_int(3),
        *_int(2),
        Format("ternary", 2, _line(3, -1), False),
        Format("ternary-offset", 2, _line(3, 0), True),
        Format("ternary2", 4, _planes((-1.0, 0.0, 1.0)), False),
        Format("binary", 1, _line(2, 0), True),
        Format("binary-sym", 1, _line(2, -1, 2.0), False),
        Format("binary2", 2, _planes((-1.0, 1.0)), False),
    )
}


def get_format(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ValueError: no such format; the message lists the known ones.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown; known: {' '.join(FORMATS)}")
    return FORMATS[name]
