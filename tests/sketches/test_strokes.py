"""Pictures of strokes against what a line and a frame are, and copies of drawings against their limits."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from conftest import ROOT

from gpt2xla.sketches.augmentation import altered
from gpt2xla.sketches.strokes import Drawings, rasterise, rasterise_all

QUICKDRAW = ROOT / "tests" / "sketches" / "quickdraw"


def drawings() -> list[list[np.ndarray]]:
    """The strokes of all drawings, (n, 2) each."""
    lines = [line for file in sorted(QUICKDRAW.glob("*.ndjson")) for line in file.read_text().splitlines()]
    return [[np.array(stroke[:2], dtype=float).T for stroke in json.loads(line)["drawing"]] for line in lines]


def together(all_strokes: list[list[np.ndarray]]) -> Drawings:
    points = np.concatenate([stroke for strokes in all_strokes for stroke in strokes]).T
    lengths = [len(stroke) for strokes in all_strokes for stroke in strokes]
    return Drawings(points, np.array(lengths), np.array([len(strokes) for strokes in all_strokes]))


def test_a_line_is_one_pixel_wide_and_nowhere_further_than_half_a_pixel_from_itself() -> None:
    for x, y in itertools.product((-23, -11, -7, 0, 1, 10, 23), (-23, -16, 0, 3, 22, 23)):
        if max(abs(x), abs(y)) < 23:
            continue  # it would be enlarged
        ink = np.argwhere(rasterise([np.array([[0, 0], [x, y]])]))
        assert len(ink) == 24
        along, across = (1, 0) if abs(x) == 23 else (0, 1)
        ink = ink[np.argsort(ink[:, along])]
        assert np.array_equal(ink[:, along], np.arange(24))
        first, last = ink[[0, -1], across]
        assert abs(first - last) == min(abs(x), abs(y))
        assert abs(first + last - 23) <= 1
        assert np.sign(last - first) == (np.sign(x * y) if first != last else 0)
        assert np.abs(ink[:, across] - np.linspace(first, last, 24)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("size", [8, 24, 28])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize(("across", "down"), [(1.0, 1.0), (300.0, 100.0), (0.02, 0.04), (5.0, 0.0)])
def test_a_rectangle_fills_its_longer_side_keeps_its_shape_and_stands_in_the_middle(
    size: int, width: int, across: float, down: float
) -> None:
    corners = np.array([[0, 0], [across, 0], [across, down], [0, down], [0, 0]]) - 77.7
    picture = rasterise([corners], size, width)
    ink = np.argwhere(picture)
    low, high = ink.min(axis=0), ink.max(axis=0)
    extent = (high - low)[::-1] + 1 - width
    expected = (size - width) * np.array([across, down]) / max(across, down)
    assert np.abs(extent - expected).max() <= 1
    assert extent.max() == size - width
    assert np.abs(low + high - (size - 1)).max() <= 1
    outline = np.zeros_like(picture)
    outline[low[0] : high[0] + 1, low[1] : high[1] + 1] = True
    outline[low[0] + width : high[0] + 1 - width, low[1] + width : high[1] + 1 - width] = False
    assert np.array_equal(picture, outline)


def test_a_wider_pen_covers_each_point_of_a_narrower_one() -> None:
    for strokes in drawings():
        thin = rasterise(strokes, 23, 1)
        wide = np.zeros((24, 24), dtype=bool)
        for row, column in itertools.product((0, 1), (0, 1)):
            wide[row : row + 23, column : column + 23] |= thin
        assert np.array_equal(rasterise(strokes, 24, 2), wide)


def test_many_drawings_at_once_are_the_same_pictures() -> None:
    alone = [rasterise(strokes) for strokes in drawings()]
    assert np.array_equal(rasterise_all(together(drawings())), np.stack(alone))
    assert all(picture.any() for picture in alone)


def test_dots_are_drawn_and_nothing_is_not() -> None:
    assert np.argwhere(rasterise([np.array([[5.0, 9.0]])], 9)).tolist() == [[4, 4]]
    strokes = [np.array([[0.0, 0.0]]), np.array([[10.0, 0.0], [10.0, 0.0]])]
    assert np.argwhere(rasterise(strokes, 11)).tolist() == [[5, 0], [5, 10]]
    assert not rasterise([]).any()
    assert not rasterise([np.empty((0, 2))]).any()


@pytest.mark.parametrize("bad", [[[0, 0], [np.nan, 1]], [[0, 0], [np.inf, 1]], [[0, 0], [1e9, 1]], [[0, 0, 1]], [1, 2]])
def test_what_is_no_stroke_is_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="must"):
        rasterise([np.array(bad)])


def test_copies_differ_a_little_and_stay_inside() -> None:
    some = drawings()
    numbers = np.arange(len(some), dtype=np.uint64) * np.uint64(12345678901)
    for copy in range(20):
        drawn = altered(together(some), numbers + np.uint64(copy), 24)
        pictures = rasterise_all(drawn.drawings, 24, scale=drawn.scale, shift=drawn.shift)
        assert np.abs(drawn.shift).max() <= 2
        for strokes, picture, scale in zip(some, pictures, drawn.scale, strict=True):
            ink = np.argwhere(picture)
            # None is cut off: the longer side is as long as it should be.
            assert (ink.max(axis=0) - ink.min(axis=0)).max() == pytest.approx(23 * scale, abs=1)
            middle = (ink.max(axis=0) + ink.min(axis=0)) / 2
            assert np.abs(middle - 11.5).max() <= 2.5
            assert not np.array_equal(picture, rasterise(strokes))
    again = altered(together(some[5:6]), numbers[5:6] + np.uint64(19), 24)
    assert np.array_equal(rasterise_all(again.drawings, 24, scale=again.scale, shift=again.shift)[0], pictures[5])


def test_a_copy_is_turned_sheared_and_stretched_within_limits() -> None:
    """The shapes of a unit square: what a linear map does is what it does to that."""
    square = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    numbers = np.arange(1000, dtype=np.uint64) ** np.uint64(3)
    points = altered(together([[square]] * 1000), numbers, 24).drawings.points.reshape(2, 1000, 3)
    right, down = points[:, :, 1] - points[:, :, 0], points[:, :, 2] - points[:, :, 0]
    turn = np.arctan2(right[1], right[0])
    area = right[0] * down[1] - right[1] * down[0]
    between = np.arctan2(area, (right * down).sum(axis=0))
    stretch = np.log(np.hypot(*right) / (area / np.hypot(*right)))
    for value, middle, most in ((turn, 0, 0.25), (np.tan(np.pi / 2 - between), 0, 0.2), (stretch, 0, 0.18)):
        assert np.abs(value).max() <= most + 1e-9
        assert np.abs(value).max() > 0.98 * most
        assert value.mean() == pytest.approx(middle, abs=0.05 * most)
    assert area == pytest.approx(np.ones(1000))
