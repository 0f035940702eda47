"""The roofline picture: what each kernel reaches against what the machine can do.

A kernel that moves b bytes and does f operations in t seconds is a point at intensity f / b and rate f / t. No point
lies above min(peak, bandwidth * intensity) (Williams, Waterman, Patterson 2009): on the slope the memory decides, below
the flat part the arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

INK, GREY, LINE = "#1d2733", "#66717e", "#d5dae1"
COLORS = ("#1f6feb", "#c2410c", "#12703c", "#7c3aed", "#b3261e", "#0e7490", "#a16207", "#66717e", "#be185d")
MARKERS = "osD^vP*X<"
GIGA = 1e9


@dataclass(frozen=True)
class Point:
    """One measured kernel.

    Attributes:
        series: what it belongs to, such as a format; one colour and marker each.
        n_bytes: bytes that must be read and written.
        n_operations: multiplications and additions, 2 M N K for a product.
        seconds: median time.
    """

    series: str
    n_bytes: float
    n_operations: float
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.n_operations / self.n_bytes

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.n_operations / self.seconds


def draw_roofline(
    path: str | Path,
    title: str,
    points: Sequence[Point],
    *,
    bandwidth: float,
    peak: float,
    subtitle: str = "",
) -> None:
    """Draw the points under the roof into a PNG.

    Args:
        path: file to write.
        title: heading.
        points: what was measured.
        bandwidth: measured bytes per second.
        peak: measured operations per second of a large dense product.
        subtitle: machine, date, what was counted.

    Raises:
        ValueError: no points, or a ceiling that is not positive.
    """
    if not points or bandwidth <= 0 or peak <= 0:
        raise ValueError(
            f"a roofline needs points and ceilings above 0, got {len(points)}, {bandwidth:g} and {peak:g}"
        )
    figure = Figure(figsize=(10, 5.6), dpi=150)
    axes = figure.add_axes((0.09, 0.12, 0.56, 0.7))
    low = min(point.intensity for point in points) / 2
    high = max(max(point.intensity for point in points), peak / bandwidth) * 3
    roof = np.geomspace(low, high, 200)
    axes.loglog(roof, np.minimum(peak, bandwidth * roof) / GIGA, color=INK, linewidth=1.5)
    ceilings = f"roof: {bandwidth / GIGA:,.0f} GB/s, {peak / GIGA:,.0f} Gop/s (dense product)"
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        mine = [point for point in points if point.series == series]
        share = max(p.rate / min(peak, bandwidth * p.intensity) for p in mine)
        axes.loglog(
            [p.intensity for p in mine],
            [p.rate / GIGA for p in mine],
            MARKERS[(number + number // len(COLORS)) % len(MARKERS)],  # no pair of both comes again soon
            color=COLORS[number % len(COLORS)],
            label=f"{series}, {share:.0%}",
            markersize=7,
        )
    _finish(axes)
    figure.text(0.09, 0.94, title, fontsize=13, weight="bold", color=INK)
    figure.text(0.09, 0.895, subtitle, fontsize=9, color=GREY)
    figure.text(0.09, 0.855, ceilings, fontsize=9, color=GREY)
    figure.savefig(path, format="png")


def _finish(axes: Axes) -> None:
    axes.set_xlabel("operations per byte", color=GREY)
    axes.set_ylabel("billions of operations per second", color=GREY)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color=LINE, linewidth=0.6)
    axes.tick_params(colors=GREY)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8, labelcolor=INK
    )
    legend.set_title("share of the roof", prop={"size": 8})
    legend.set_alignment("left")
