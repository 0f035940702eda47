"""The picture of a demo run: what the model sees, what its tokens weigh, and what each width answers.

One column per question. From top to bottom: the test image, the saliency of its tokens drawn over it, the
question, and a row per model with its answer. A right answer is green and carries a tick, a wrong one red and
a cross, so the picture reads without colours too. Drawn with matplotlib's Figure alone: no window system, no
global state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import FancyBboxPatch
from PIL import Image

INK, GREY, LINE = "#1d2733", "#66717e", "#d5dae1"
RIGHT, WRONG = "#12703c", "#b3261e"
RIGHT_FILL, WRONG_FILL = "#e4f4ea", "#fce8e6"
HEAT = "YlOrRd"
CHARACTERS = 22  # of a heading that fit over one question
CELL, LABEL, GAP = 1.55, 2.75, 0.14  # inches: width of a question, of the models' labels, between groups


@dataclass(frozen=True)
class Example:
    """One question: `saliency` is (rows, columns) of image tokens, relative to their mean; `group` its heading."""

    image: Image.Image
    question: str
    right_answer: str
    saliency: np.ndarray
    group: str


@dataclass(frozen=True)
class Answers:
    """One model's row: its name, a line of figures, and an answer with its verdict for each example."""

    name: str
    figures: str
    answers: tuple[str, ...]
    is_right: tuple[bool, ...]


def draw(
    path: str | Path, title: str, subtitle: str, examples: Sequence[Example], rows: Sequence[Answers]
) -> None:
    """Write the picture as a PNG.

    Args:
        path: the file; its folder exists.
        title: headline.
        subtitle: one line below it.
        examples: the questions; those of one group stand side by side.
        rows: one per model, the original first.

    Raises:
        ValueError: no example, or a row with another number of answers.
    """
    if not examples or any(len(row.answers) != len(examples) for row in rows):
        raise ValueError(
            f"expected an answer of each model to each of the {len(examples)} examples, at least one"
        )
    lefts = _lefts(examples)
    heights = {"head": 1.0, "group": 0.5, "image": CELL, "heat": CELL, "question": 0.62}
    row_height, foot = 0.5, 0.3
    width = lefts[-1] + CELL + 0.35
    height = sum(heights.values()) + row_height * len(rows) + foot
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")

    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set_xlim(0, width)
    canvas.set_ylim(height, 0)
    canvas.axis("off")
    canvas.text(0.3, 0.38, title, fontsize=17, weight="bold", color=INK, va="center")
    canvas.text(0.3, 0.74, subtitle, fontsize=10.5, color=GREY, va="center")

    top = heights["head"]
    _draw_groups(canvas, examples, lefts, top + heights["group"] / 2)
    top += heights["group"]
    heat: AxesImage | None = None
    peak = max(float(example.saliency.max()) for example in examples)
    for example, left in zip(examples, lefts, strict=True):
        _picture(figure, left, top, example.image)
        heat = _heat_map(figure, left, top + CELL, example, peak)
    canvas.text(0.3, top + CELL * 0.5, "image", fontsize=11, weight="bold", color=INK, va="center")
    _draw_scale(figure, canvas, heat, top + CELL)
    top += heights["image"] + heights["heat"]
    for example, left in zip(examples, lefts, strict=True):
        lines = wrap(example.question, 21)[:3]
        middle = top + heights["question"] / 2
        canvas.text(
            left + CELL / 2, middle, "\n".join(lines), fontsize=8.8, color=INK, ha="center", va="center"
        )
    top += heights["question"]
    for row in rows:
        _draw_row(canvas, row, lefts, top, row_height)
        top += row_height
    figure.savefig(path)


def _lefts(examples: Sequence[Example]) -> list[float]:
    """Left edge of each column, in inches; a gap where the group changes."""
    lefts, left = [], LABEL
    for i, example in enumerate(examples):
        left += GAP if i and example.group != examples[i - 1].group else 0.0
        lefts.append(left)
        left += CELL
    return lefts


def _draw_groups(canvas: Axes, examples: Sequence[Example], lefts: Sequence[float], middle: float) -> None:
    """A heading over the columns of each group, with a line below."""
    for group in dict.fromkeys(example.group for example in examples):
        columns = [left for example, left in zip(examples, lefts, strict=True) if example.group == group]
        start, end = columns[0] + 0.06, columns[-1] + CELL - 0.06
        text = "\n".join(wrap(group, CHARACTERS * len(columns)))
        canvas.text(start, middle + 0.14, text, fontsize=9.5, color=GREY, va="bottom")
        canvas.plot([start, end], [middle + 0.21] * 2, color=LINE, linewidth=1)


def _axes(figure: Figure, left: float, top: float, size: float) -> Axes:
    """Square axes without ticks; positions in inches from the top left corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(LINE)
    return axes


def _picture(figure: Figure, left: float, top: float, image: Image.Image) -> Axes:
    axes = _axes(figure, left + 0.06, top + 0.06, CELL - 0.12)
    axes.imshow(np.asarray(image), interpolation="nearest")
    return axes


def _heat_map(figure: Figure, left: float, top: float, example: Example, peak: float) -> AxesImage:
    """The image in light grey with one coloured square per token over it; what weighs nothing lets it through."""
    grey = example.image.convert("L").point(lambda value: 110 + value * 145 // 255)
    axes = _picture(figure, left, top, grey.convert("RGB"))
    width, height = example.image.size
    norm = PowerNorm(0.5, vmin=0, vmax=peak)
    return axes.imshow(
        example.saliency,
        cmap=HEAT,
        norm=norm,
        alpha=np.clip(0.05 + 1.2 * np.asarray(norm(example.saliency)), 0, 0.85),
        interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )


def _draw_scale(figure: Figure, canvas: Axes, heat: AxesImage | None, top: float) -> None:
    """What the heat map shows, and its colour bar, in the label column."""
    canvas.text(0.3, top + 0.36, "token saliency", fontsize=11, weight="bold", color=INK, va="center")
    note = "how much an error in each\nimage token costs the answer"
    canvas.text(0.3, top + 0.72, note, fontsize=8.5, color=GREY, va="center")
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.3 / width, 1 - (top + 1.14) / height, 1.9 / width, 0.13 / height))
    bar = figure.colorbar(heat, cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=7.5, colors=GREY, length=2, pad=1.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")


def _draw_row(canvas: Axes, row: Answers, lefts: Sequence[float], top: float, height: float) -> None:
    """One model: its label, and a box per answer."""
    canvas.plot([0.3, lefts[-1] + CELL - 0.06], [top] * 2, color=LINE, linewidth=0.8)
    canvas.text(0.3, top + height * 0.34, row.name, fontsize=11, weight="bold", color=INK, va="center")
    canvas.text(0.3, top + height * 0.73, row.figures, fontsize=8.2, color=GREY, va="center")
    for left, answer, is_right in zip(lefts, row.answers, row.is_right, strict=True):
        colour, fill, mark = (RIGHT, RIGHT_FILL, "✓") if is_right else (WRONG, WRONG_FILL, "✗")
        box = FancyBboxPatch(
            (left + 0.1, top + 0.08),
            CELL - 0.2,
            height - 0.16,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=fill,
            edgecolor="none",
        )
        canvas.add_patch(box)
        shown = answer if len(answer) <= 12 else answer[:11] + "…"
        text = f"{mark} {shown}" if shown else f"{mark} (nothing)"
        weight = "normal" if is_right else "bold"
        middle = (left + CELL / 2, top + height / 2)
        canvas.text(*middle, text, fontsize=10, color=colour, weight=weight, ha="center", va="center")
