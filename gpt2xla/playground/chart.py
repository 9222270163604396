"""Line charts as HTML: an SVG that stretches with the page, and labels around it that do not. Their colors are in
`figures.css`, one set for light pages and one for dark ones."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

_FEW = 6  # labels below a chart, which a narrow page has room for
COLORS = 6  # that figures.css has
_WIDTH, _HEIGHT = 1000, 300  # of the SVG's own coordinates


class Series(NamedTuple):
    """What is drawn in one color: `x` and `y` of its points, NaN for a gap. Series without a name are not in the legend."""

    name: str
    color: int
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    kind: Literal["line", "pale", "dots"] = "line"


class Axis(NamedTuple):
    """From which number to which one an axis goes, and the labels at its ticks."""

    start: float
    end: float
    ticks: Sequence[tuple[float, str]] = ()

    def share(self, value: float | np.ndarray) -> float | np.ndarray:
        """Return where a value is: 0 at the start, 1 at the end."""
        return (value - self.start) / ((self.end - self.start) or 1.0)


class Hint(NamedTuple):
    """What the page says while one points at a place from x = `start` to `end`."""

    start: float
    end: float
    text: str


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, hints: Iterable[Hint] = ()) -> str:
    """Return the chart as HTML. Texts may hold any characters."""
    lines = "".join(f'<path class="grid" d="M0 {_down(y, tick):.1f}H{_WIDTH}"/>' for tick, _ in y.ticks) + "".join(
        _path(one, x, y) for one in series
    )
    places = "".join(
        f'<rect class="hint" x="{x.share(hint.start) * _WIDTH:.2f}" y="0" height="{_HEIGHT}" '
        f'width="{(x.share(hint.end) - x.share(hint.start)) * _WIDTH:.2f}"><title>{html.escape(hint.text)}</title></rect>'
        for hint in hints
    )
    names = "".join(
        f'<span class="{one.kind} color-{one.color % COLORS}"><i></i>{html.escape(one.name)}</span>'
        for one in series
        if one.name
    )
    across = "".join(
        f'<span class="x" style="left:{x.share(place):.2%}">{html.escape(label)}</span>' for place, label in x.ticks
    )
    up = "".join(
        f'<span class="y" style="top:{1 - y.share(place):.2%}">{html.escape(label)}</span>' for place, label in y.ticks
    )
    room = "many" if len(x.ticks) > _FEW else "few"
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(title)}</b>{names}</figcaption><div class="plot">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{html.escape(title)}">'
        f'{lines}{places}</svg>{up}<div class="{room}">{across}</div></div></figure>'
    )


def ticks(start: float, end: float, most: int = 5) -> list[float]:
    """Return at most `most` + 1 round numbers from `start` to `end`, 1, 2 or 5 times a power of ten apart."""
    least = (end - start) / most
    if not (math.isfinite(least) and least > 0):
        return [start]
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    return [number * step for number in range(math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9) + 1)]


def _down(y: Axis, value: float | np.ndarray) -> float | np.ndarray:
    return (1 - y.share(value)) * _HEIGHT


def _path(series: Series, x: Axis, y: Axis) -> str:
    """Return the line through the points, or a dot for each: a line of no length, round however the SVG is stretched."""
    across, down = x.share(np.asarray(series.x, float)) * _WIDTH, _down(y, np.asarray(series.y, float))
    parts, is_open = [], False
    for a, d in zip(np.round(across, 1).tolist(), np.round(down, 1).tolist(), strict=True):
        if not (math.isfinite(a) and math.isfinite(d)):
            is_open = False
        elif series.kind == "dots":
            parts.append(f"M{a:g} {d:g}h0")
        else:
            parts.append(f"{'L' if is_open else 'M'}{a:g} {d:g}{'' if is_open else 'h0'}")
            is_open = True
    return f'<path class="{series.kind} color-{series.color % COLORS}" d="{"".join(parts)}"/>'
