"""Scenes of coloured shapes with captions that are known to be true or false: the data of the small CLIP.

Things are cut out of the pictures of easy-vqa (one shape on a ground of one colour) with their colour and kind, and
placed, one or two of them, on a fresh ground. A caption asserts a part of what is known,

    a photo of a small red circle on the left | a green triangle above a gray circle | a teal rectangle

so whether any caption is true of any scene can be computed: `Claim.holds`. A picture of easy-vqa as it is is a scene of
one thing too.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmq.eval.easy_vqa_data import question_kind

COLORS = {
    (0, 0, 0): "black",
    (0, 0, 255): "blue",
    (165, 42, 42): "brown",
    (128, 128, 128): "gray",
    (0, 255, 0): "green",
    (255, 0, 0): "red",
    (0, 128, 128): "teal",
    (255, 255, 0): "yellow",
}
KINDS = ("circle", "rectangle", "triangle")
SIZES = ("small", "large")
SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
RELATIONS = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
OPENINGS = ("", "a photo of ", "a picture of ", "an image of ", "there is ")
SIZE = 64
# Between these longest sides, in pixels, a thing is neither small nor large.
SMALL, LARGE = 18, 23
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_LONGEST_OF_TWO = 27


@dataclass(frozen=True, eq=False)
class Thing:
    """A shape cut out of its picture.

    `pixels`: (height, width, 3) uint8, `mask`: (height, width) bool. `is_cut` says that the picture's border cuts it.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    color: str
    kind: str
    is_cut: bool


@dataclass(frozen=True)
class Placed:
    """A thing in a scene: what it is and the box that it fills, in pixels."""

    color: str
    kind: str
    left: int
    top: int
    width: int
    height: int

    @property
    def size(self) -> str | None:
        """The word for its size; None between small and large."""
        longest = max(self.width, self.height)
        return "small" if longest <= SMALL else "large" if longest >= LARGE else None

    def sides(self) -> set[str]:
        """Where in the picture it lies: all of it in that half."""
        right, bottom = self.left + self.width, self.top + self.height
        found = {"left": right <= SIZE // 2, "right": self.left >= SIZE // 2}
        found |= {"top": bottom <= SIZE // 2, "bottom": self.top >= SIZE // 2}
        return {side for side, is_there in found.items() if is_there}

    def relations(self, other: "Placed") -> set[str]:
        """Where it lies as seen from another thing: no row or column is shared."""
        found = {"left": self.left + self.width <= other.left, "right": self.left >= other.left + other.width}
        found |= {"top": self.top + self.height <= other.top, "bottom": self.top >= other.top + other.height}
        return {side for side, is_there in found.items() if is_there}


@dataclass(frozen=True)
class Scene:
    """A picture, (64, 64, 3) uint8, and the things in it."""

    pixels: NDArray[np.uint8]
    things: tuple[Placed, ...]

    @property
    def image(self) -> Image.Image:
        """The picture for a processor."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Part:
    """What a claim says of one thing; None says nothing."""

    color: str
    kind: str
    size: str | None = None
    side: str | None = None

    def holds(self, thing: Placed) -> bool:
        """Whether all of it is true of a thing."""
        is_same = (self.color, self.kind) == (thing.color, thing.kind)
        fits = self.size in (None, thing.size) and (self.side is None or self.side in thing.sides())
        return is_same and fits

    def words(self) -> str:
        """A noun phrase."""
        size = f"{self.size} " if self.size else ""
        side = f" {SIDES[self.side]}" if self.side else ""
        return f"a {size}{self.color} {self.kind}{side}"


@dataclass(frozen=True)
class Claim:
    """What a caption asserts: one thing, or two and where the first one lies as seen from the second."""

    first: Part
    second: Part | None = None
    relation: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether it is true of a scene."""
        if self.second is None:
            return any(self.first.holds(thing) for thing in scene.things)
        return any(
            self.first.holds(a)
            and self.second.holds(b)
            and (self.relation is None or self.relation in a.relations(b))
            for a in scene.things
            for b in scene.things
            if a is not b
        )

    def text(self, opening: str = "") -> str:
        """The caption."""
        if self.second is None:
            return opening + self.first.words()
        joint = "and" if self.relation is None else RELATIONS[self.relation]
        return f"{opening}{self.first.words()} {joint} {self.second.words()}"


def cut_out(image: Image.Image, kind: str) -> tuple[Thing, Scene]:
    """The shape of a picture of easy-vqa, and the picture as a scene.

    Raises:
        ValueError: the shape has none of the data set's colours.
    """
    pixels = np.asarray(image.convert("RGB"))
    corners = [tuple(int(v) for v in pixels[y, x]) for y in (0, -1) for x in (0, -1)]
    ground = Counter(corners).most_common(1)[0][0]
    mask = (pixels != np.array(ground)).any(axis=-1)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    is_cut = bool(top == 0 or left == 0 or bottom == SIZE or right == SIZE)
    inner = Counter(tuple(int(v) for v in pixel) for pixel in pixels[mask]).most_common(1)[0][0]
    if inner not in COLORS:
        raise ValueError(f"the shape has the color {inner}; known: {COLORS}")
    color = COLORS[inner]
    box = slice(top, bottom), slice(left, right)
    placed = Placed(color, kind, int(left), int(top), int(right - left), int(bottom - top))
    return Thing(pixels[box], mask[box], color, kind, is_cut), Scene(pixels, (placed,))


def compose(things: Sequence[Thing], generator: random.Random) -> Scene:
    """Place things at random on a ground of one light colour, none beside another in the same rows and columns.

    Two things are shrunk where they are too long to leave room; things are flipped at random from left to right.
    """
    ground = np.array([generator.randint(228, 252) for _ in range(3)], dtype=np.uint8)
    pixels = np.broadcast_to(ground, (SIZE, SIZE, 3)).copy()
    cuts = [_varied(thing, generator, is_alone=len(things) == 1) for thing in things]
    placed: list[Placed] = []
    while len(placed) < len(things):
        placed = []
        for thing, (_, mask) in zip(things, cuts, strict=True):
            height, width = mask.shape
            left, top = generator.randint(0, SIZE - width), generator.randint(0, SIZE - height)
            spot = Placed(thing.color, thing.kind, left, top, width, height)
            if not all(spot.relations(other) for other in placed):
                break
            placed.append(spot)
    for spot, (cut, mask) in zip(placed, cuts, strict=True):
        target = pixels[spot.top : spot.top + spot.height, spot.left : spot.left + spot.width]
        target[mask] = cut[mask]
    return Scene(pixels, tuple(placed))


def _varied(
    thing: Thing, generator: random.Random, *, is_alone: bool
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pixels and mask of a thing, shrunk if it must leave room, perhaps flipped."""
    cut, mask = thing.pixels, thing.mask
    longest = max(mask.shape)
    if not is_alone and longest > _LONGEST_OF_TWO:
        share = generator.uniform(16, _LONGEST_OF_TWO) / longest
        height, width = (max(8, round(side * share)) for side in mask.shape)
        cut = np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.NEAREST))
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    return (cut[:, ::-1], mask[:, ::-1]) if generator.random() < 0.5 else (cut, mask)


def random_claim(scene: Scene, generator: random.Random, *, is_full: bool = False) -> Claim:
    """A claim that is true of the scene; `is_full` says all there is to say of two things or of one."""

    def part(thing: Placed, p_side: float) -> Part:
        sides = sorted(thing.sides())
        size = thing.size if is_full or generator.random() < 0.3 else None
        side = generator.choice(sides) if sides and generator.random() < p_side else None
        return Part(thing.color, thing.kind, size, side)

    things = list(scene.things)
    generator.shuffle(things)
    if len(things) == 1 or (not is_full and generator.random() < 0.25):
        return Claim(part(things[0], 1.0 if is_full else 0.3))
    first, second = things[:2]
    relations = sorted(first.relations(second))
    relation = generator.choice(relations) if is_full or generator.random() < 0.6 else None
    return Claim(part(first, 0.0), part(second, 0.0), relation)


def kind_of_picture(questions: Sequence[tuple[str, str]]) -> str | None:
    """The kind of shape that the questions and answers about a picture tell; None if they do not."""
    possible = set(KINDS)
    for question, answer in questions:
        if answer in KINDS:
            return answer
        named = [kind for kind in KINDS if kind in question.rstrip("?").split()]
        if len(named) == 1:
            is_there = question_kind(question) in ("color", "shape") or (
                (answer == "yes") == (question_kind(question) == "presence")
            )
            possible &= {named[0]} if is_there else possible - {named[0]}
    return possible.pop() if len(possible) == 1 else None
