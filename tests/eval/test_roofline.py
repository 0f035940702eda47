"""The roofline picture: a file, the values of a point, ceilings that make no sense."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from vlmq.eval.roofline import Point, draw_roofline


def test_a_point_has_intensity_and_rate():
    point = Point("int4", n_bytes=4.0, n_operations=32.0, seconds=0.5)
    assert (point.intensity, point.rate) == (8.0, 64.0)


def test_the_picture_is_written(tmp_path):
    points = [Point(f"int{bits}", 1e6 * bits, 2e6, 1e-4) for bits in (2, 3, 4)]
    draw_roofline(tmp_path / "roof.png", "title", points, bandwidth=2e10, peak=1e11, subtitle="machine")
    assert Image.open(tmp_path / "roof.png").size == (1500, 840)


def test_many_series_can_be_told_apart_and_their_names_fit(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    points = [Point(f"bitsandbytes int8-channel {i}", 1e6 + i, 2e6, 1e-4) for i in range(16)]
    draw_roofline(tmp_path / "roof.png", "title", points, bandwidth=2e10, peak=1e11)
    (axes,) = figures[0].axes
    lines = axes.get_lines()[1:]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 16
    box = axes.get_legend().get_window_extent()
    assert box.x1 < 1500
    assert box.y0 > 0


@pytest.mark.parametrize(("points", "bandwidth", "peak"), [([], 1.0, 1.0), ([Point("a", 1, 1, 1)], 0.0, 1.0)])
def test_nothing_to_draw_is_refused(tmp_path, points, bandwidth, peak):
    with pytest.raises(ValueError, match="needs points and ceilings above 0"):
        draw_roofline(tmp_path / "roof.png", "title", points, bandwidth=bandwidth, peak=peak)
    assert not list(tmp_path.iterdir())
