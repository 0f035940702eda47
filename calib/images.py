"""Open an image of any usual origin: a PIL image, a path, a URL, bytes, an array, a row of `datasets`.

The result is always RGB, upright (EXIF orientation applied), and at most `max_pixels` large. An image that
cannot be read raises a ValueError whose text is made for a list of bad rows.
"""

import io
import struct
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
DOWNLOAD_SECONDS = 30


def is_image(value: Any) -> bool:
    """Whether `value` is something that `open_image` takes; a string counts if it ends like an image file."""
    if isinstance(value, str):
        return value.startswith("data:image/") or is_image_path(value)
    if isinstance(value, Mapping):
        return value.keys() <= {"bytes", "path"} and any(value.get(key) for key in ("bytes", "path"))
    return isinstance(value, Image.Image | np.ndarray | Tensor | Path | bytes)


def is_image_path(text: str) -> bool:
    """Whether a string ends in the suffix of an image file."""
    return "\n" not in text and Path(text.split("?")[0]).suffix.lower() in IMAGE_SUFFIXES


def open_image(source: Any, *, folder: Path | None = None, max_pixels: int | None = None) -> Image.Image:
    """Decode one image.

    Args:
        source: a PIL image, path, http(s) or data URL, file contents as bytes, `{"bytes", "path"}` of a
            `datasets` row, or an array (height, width), (height, width, n_channels) or (n_channels, height,
            width): uint8, or floats in [0, 1].
        folder: what a relative path is relative to.
        max_pixels: a larger image is shrunk to at most so many pixels, its aspect ratio kept.

    Raises:
        ValueError: the image is missing, corrupt or of no known kind; the text names it.
    """
    image, name = _read(source, folder)
    try:
        image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is corrupt: {error}") from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        shrink = (max_pixels / (image.width * image.height)) ** 0.5
        image = image.resize((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
    return image


def _read(source: Any, folder: Path | None) -> tuple[Image.Image, str]:
    """The undecoded image and a name for messages."""
    if isinstance(source, Image.Image):
        return source, "image"
    if isinstance(source, np.ndarray | Tensor):
        return _from_array(np.asarray(source.cpu() if isinstance(source, Tensor) else source)), "image array"
    if isinstance(source, Mapping):
        name = source.get("path") or None
        if source.get("bytes") is None:
            return _read(name, folder)
        return _decode(source["bytes"], f"image {name!r}" if name else "image"), f"image {name!r}"
    if isinstance(source, bytes):
        return _decode(source, "image"), "image"
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        name = f"image {source[:80]!r}"
        try:
            with urllib.request.urlopen(source, timeout=DOWNLOAD_SECONDS) as response:
                return _decode(response.read(), name), name
        except OSError as error:
            raise ValueError(f"{name} could not be fetched: {error}") from error
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        path = path if folder is None or path.is_absolute() else folder / path
        if not path.is_file():
            raise ValueError(f"image file '{path}' does not exist")
        return _decode(path.read_bytes(), f"image file '{path}'"), f"image file '{path}'"
    raise ValueError(f"expected an image, path, URL, bytes or array, got {type(source).__name__}")


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"{name} is empty")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is corrupt or of an unknown format") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is corrupt: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ValueError(f"expected an image array (height, width, 3), got shape {tuple(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError(
                "a floating-point image array must lie in [0, 1]; give uint8 in [0, 255] otherwise"
            )
        array = np.round(array * 255)
    return Image.fromarray(array.astype(np.uint8))
