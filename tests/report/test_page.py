"""The parts of a page: charts whose geometry can be read back, pictures, escaping."""

import base64
import io
import math
import re

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.report import page


def chart(points, **names):
    names = {"label": "a label", "x_name": "step", "y_name": "loss", **names}
    return page.line_chart([(x, y, f"step {x}: {y}") for x, y in points], **names)


def curve(markup: str, kind: str = "line") -> list[tuple[float, float]]:
    found = re.search(rf'<polyline class="{kind}" points="([^"]*)"', markup)
    return [tuple(map(float, pair.split(","))) for pair in found[1].split()]


def texts(markup: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", markup)


def test_a_curve_spans_its_axes():
    markup = chart([(0, 4.0), (50, 2.0), (100, 0.0)])
    points = curve(markup)
    assert points[0] == (page.LEFT, page.TOP)
    assert points[-1] == (page.WIDTH - page.RIGHT, page.HEIGHT - page.BOTTOM)
    assert points[1] == (pytest.approx((points[0][0] + points[2][0]) / 2), pytest.approx((page.TOP + points[2][1]) / 2))
    assert texts(markup) == ["0", "1", "2", "3", "4", "0", "20", "40", "60", "80", "100", "step", "loss"]


def test_a_wide_range_gets_a_log_axis():
    markup = chart([(0, 1.0), (1, 0.1), (2, 0.01), (3, 0.001)])
    assert "loss (log scale)" in texts(markup)
    heights = [y for _, y in curve(markup)]
    assert np.diff(heights) == pytest.approx([heights[1] - heights[0]] * 3, abs=0.11)
    assert "loss (log scale)" not in texts(chart([(0, 1.0), (1, 0.1)]))
    assert "loss (log scale)" not in texts(chart([(0, 100.0), (1, 0.0)]))


def test_a_long_curve_is_thinned_smoothed_and_has_few_hover_spots():
    values = [(step, 1.0 + (0.5 if step % 2 else -0.5)) for step in range(5001)]
    markup = chart(values)
    raw, line = curve(markup, "raw"), curve(markup, "line")
    assert len(raw) <= page.POINTS_DRAWN + 1
    assert raw[-1][0] == page.WIDTH - page.RIGHT
    inner = [y for _, y in line[20:-20]]
    assert max(inner) - min(inner) < 2  # the noise is averaged away
    assert markup.count('<g class="spot">') <= page.SPOTS + 1
    assert "<title>step 0: 0.5</title>" in markup
    assert "<title>step 5000: 0.5</title>" in markup


def test_a_short_curve_shows_every_value_on_hover():
    markup = chart([(0, 3.0), (7, 2.5), (9, 2.0)])
    assert re.findall("<title>(.*?)</title>", markup) == ["step 0: 3.0", "step 7: 2.5", "step 9: 2.0"]


def test_values_that_are_not_finite_are_counted():
    markup = chart([(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])
    assert len(curve(markup)) == 2
    assert "2 of 4 values are not finite" in markup
    assert "nan" not in markup
    nothing = chart([(0, math.nan)])
    assert "<svg" not in nothing
    assert "Nothing to draw. 1 of 1 values are not finite" in nothing


@pytest.mark.parametrize("points", [[(5, 2.0)], [(0, 0.0), (1, 0.0)], [(0, 0.25), (1, 0.25)], [(0, 1e-9), (1, 9.0)]])
def test_degenerate_curves_stay_inside_the_frame(points):
    markup = chart(points)
    places = (
        curve(markup) if len(points) > 1 else [tuple(map(float, re.search('cx="(.*?)" cy="(.*?)"', markup).groups()))]
    )
    for x, y in places:
        assert page.LEFT <= x <= page.WIDTH - page.RIGHT
        assert page.TOP <= y <= page.HEIGHT - page.BOTTOM
    assert len(texts(markup)) > 3


def test_a_second_curve_shares_the_axes():
    other = [(0, 8.0, ""), (20, 4.0, ""), (30, math.nan, "")]
    markup = page.line_chart([(0, 3.0, "a"), (10, 2.0, "b")], other, label="", x_name="step", y_name="loss")
    (line,) = re.findall('class="beside" points="(.*?)"', markup)
    first, last = (tuple(map(float, point.split(","))) for point in line.split())
    assert (first[0], last[0]) == (page.LEFT, page.WIDTH - page.RIGHT)
    own = curve(markup)
    assert own[-1][0] == pytest.approx((first[0] + last[0]) / 2)  # ten of twenty steps
    assert first[1] < last[1] < own[0][1] < own[1][1]  # on the page down is less
    assert re.findall("<title>(.*?)</title>", markup) == ["a", "b"]


def test_labels_are_escaped():
    markup = page.line_chart([(0, 1.0, "<b>&")], label='"><script>', x_name="<x>", y_name="<y>")
    assert "<b>" not in markup
    assert "<script>" not in markup
    assert 'aria-label="&quot;&gt;&lt;script&gt;"' in markup


def decoded(markup: str) -> PIL.Image.Image:
    data = re.search(r'src="data:image/png;base64,([^"]+)"', markup)[1]
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


def encoded(array: np.ndarray, kind: str, **options) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)


def test_every_kind_of_picture_comes_out_alike(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(PIXELS, "PNG"))
    for image in (PIXELS, encoded(PIXELS, "PNG"), encoded(PIXELS, "BMP"), tmp_path / "x.png", str(tmp_path / "x.png")):
        markup = page.picture(image, 'a "picture"')
        assert np.array_equal(np.asarray(decoded(markup)), PIXELS)
        assert 'alt="a &quot;picture&quot;"' in markup
        assert 'class="picture tiny"' in markup
    assert np.array_equal(np.asarray(decoded(page.picture(PIL.Image.fromarray(PIXELS), ""))), PIXELS)


def test_large_pictures_are_cut_down_and_turned_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    markup = page.picture(encoded(np.zeros((500, 1000, 3), np.uint8), "JPEG", exif=exif), "")
    assert decoded(markup).size == (page.LONGEST_SIDE // 2, page.LONGEST_SIDE)
    assert 'class="picture"' in markup


def test_a_wrong_picture_is_named():
    with pytest.raises(ValueError, match=r"uint8 in 0..255, not float32"):
        page.picture(np.zeros((2, 2, 3), np.float32), "")
    with pytest.raises(TypeError, match="not int"):
        page.picture(3, "")
