"""Images of every origin open alike, and one that cannot be read says why."""

import base64
import io

import numpy as np
import pytest
from tiny_processors import picture

from vlmq.calib.images import open_image
from vlmq.calib.messages import read_row


def encoded(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_open_image_reads_every_origin(tmp_path):
    image = picture(5)
    data = encoded(image)
    (tmp_path / "x.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    origins = [image, data, "x.png", tmp_path / "x.png", {"bytes": data, "path": None}, np.asarray(image)]
    origins += [{"bytes": None, "path": "x.png"}, f"data:image/png;base64,{text}", np.asarray(image) / 255]
    for origin in origins:
        assert open_image(origin, folder=tmp_path).tobytes() == image.tobytes()
    row = read_row(0, [{"role": "user", "content": [{"type": "image", "base64": text}]}])
    assert open_image(row.images[0]).tobytes() == image.tobytes()


def test_open_image_gives_rgb_upright_and_small():
    grey = np.zeros((20, 10), np.uint8)
    assert open_image(grey).mode == "RGB"
    turned = picture(0, 30, 20)
    turned.getexif()[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=turned.getexif())
    assert open_image(buffer.getvalue()).size == (20, 30)
    assert open_image(picture(0, 60, 20), max_pixels=300).size == (30, 10)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("gone.png", "image file 'gone.png' does not exist"),
        (b"", "is empty"),
        (b"junk", "corrupt or of an unknown format"),
        (np.zeros((2, 3, 5)), "expected an image array"),
        (np.full((4, 4, 3), 7.0), "must lie in"),
        (3, "got int"),
        ("data:image/png;base64,@@", "image 'data:image/png;base64,@@' is"),
    ],
)
def test_open_image_says_what_is_wrong(origin, message):
    with pytest.raises(ValueError, match=message):
        open_image(origin)
