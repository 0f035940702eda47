"""Pictures of one known shape, from the `easy-vqa` package or those that ship with vlmq, and sets made of them.

The shipped pictures are those of `shapes-data/shapes.zip`; `shapes-data/kinds.json` says what shape each shows, since
their questions alone do not.
"""

import io
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vlmq.eval.easy_vqa_data import PARTS, indexed_rows, shapes_path
from vlmq.eval.labeled import CaptionedImages, LabeledImages
from vlmq.eval.scenes import COLORS, KINDS, Scene, Thing, compose, cut_out, kind_of_picture, random_claim


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of one shape: its name, the shape cut out of it, and the picture as a scene."""

    name: str
    thing: Thing
    scene: Scene


def small_clip_path() -> Path:
    """Folder of the small CLIP that ships with vlmq (load it with the Auto classes)."""
    return shapes_path().parent.parent / "shapes-clip"


def load_pictures(split: Literal["train", "test"]) -> list[Picture]:
    """Pictures of a split of the `easy-vqa` package whose questions tell what shape they show (96 in 100).

    Raises:
        ValueError: the split is unknown.
        ModuleNotFoundError: the package is not installed.
    """
    rows = indexed_rows(split)
    images = {number: row["image"] for number, row in rows}
    asked: dict[int, list[tuple[str, str]]] = {}
    for number, row in rows:
        asked.setdefault(number, []).append((row["question"], row["answer"]))
    kinds = {number: kind_of_picture(questions) for number, questions in asked.items()}
    return [
        Picture(str(number), *cut_out(images[number], kind))
        for number, kind in kinds.items()
        if kind is not None
    ]


def load_shipped_pictures(part: Literal["calibration", "test"]) -> list[Picture]:
    """The pictures that ship with vlmq: 256 of the train split for calibration, 512 of the test split, less those whose
    shape no question tells.

    Raises:
        ValueError: the part is unknown.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} of the shipped pictures is unknown; known: {' '.join(PARTS)}")
    kinds: dict[str, str] = json.loads((shapes_path().parent / "kinds.json").read_text())
    pictures = []
    with zipfile.ZipFile(shapes_path()) as archive:
        for name, kind in kinds.items():
            if name.startswith(f"{part}/"):
                image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                pictures.append(Picture(name, *cut_out(image, kind)))
    return pictures


def as_labeled(pictures: Sequence[Picture]) -> LabeledImages:
    """The pictures with their classes, one for each colour and kind, such as "red circle"."""
    classes = tuple(f"{color} {kind}" for color in sorted(COLORS.values()) for kind in KINDS)
    labels = tuple(classes.index(f"{p.thing.color} {p.thing.kind}") for p in pictures)
    return LabeledImages(tuple(p.scene.image for p in pictures), labels, classes)


def scenes_of_two(pictures: Sequence[Picture], n_scenes: int, *, seed: int) -> CaptionedImages:
    """New scenes of two things each, with a caption that says all there is to say: the hard set for retrieval."""
    generator = random.Random(seed)
    things = [p.thing for p in pictures if not p.thing.is_cut]
    scenes = [compose(generator.sample(things, 2), generator) for _ in range(n_scenes)]
    claims = [random_claim(scene, generator, is_full=True) for scene in scenes]
    return CaptionedImages(tuple(s.image for s in scenes), tuple((claim.text(),) for claim in claims))


def pairs(pictures: Sequence[Picture], n_pairs: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows of image and caption as those that the small CLIP was trained on: what `vlmq.calib.load` takes."""
    generator = random.Random(seed)
    things, rows = [p.thing for p in pictures if not p.thing.is_cut], []
    for _ in range(n_pairs):
        draw = generator.random()
        scene = generator.choice(pictures).scene
        if draw > 0.3:
            scene = compose(generator.sample(things, 1 if draw < 0.6 else 2), generator)
        rows.append({"image": scene.image, "caption": random_claim(scene, generator).text()})
    return rows


def write_kinds(path: Path) -> None:
    """Write `kinds.json` from the `easy-vqa` package."""
    known = {split: {p.name: p.thing.kind for p in load_pictures(split)} for split in ("train", "test")}
    with zipfile.ZipFile(shapes_path()) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
    kinds = {}
    for name in names:
        part, _, file = name.partition("/")
        kind = known["train" if part == "calibration" else "test"].get(Path(file).stem)
        if kind is not None:
            kinds[name] = kind
    path.write_text(json.dumps(kinds, indent=0) + "\n")
