"""The curves of runs as HTML: losses, learning rate, and the drawings that are recognised where that is measured."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.checkpoint.logged import newest_lines
from gpt2xla.errors import InputError
from gpt2xla.logs.run_curves import Curves, read_curves, short, thinned
from gpt2xla.logs.sinks import METRICS_FILE
from gpt2xla.playground.chart import Axis, Series, line_chart, ticks

_COLUMNS = 600  # of a chart, in which each has up to four points
Written = tuple[tuple[int, int], ...]


class _Run(NamedTuple):
    curves: Curves
    sketches: dict[str, np.ndarray]  # (n, 2) of tokens and shares, by what they are of


def when_written(roots: Iterable[Path]) -> Written:
    """Return when the metrics of each run were last written, and their size: what differs when there is more to draw."""
    found = []
    for root in roots:
        try:
            state = os.stat(root / METRICS_FILE)
            found.append((state.st_mtime_ns, state.st_size))
        except OSError:
            found.append((0, 0))
    return tuple(found)


def charts_of(roots: Mapping[str, Path], written: Written) -> str:
    """Return the charts of all runs, whose folders are known by the names that are shown, and a line for each. `written` is
    what `when_written` says of them."""
    runs, lines = dict[str, _Run](), []
    for (name, root), when in zip(roots.items(), written, strict=True):
        try:
            runs[name] = _read(root, when)
            lines.append(f"{name}: {_facts(runs[name])}")
        except InputError as error:
            lines.append(f"{name}: {error}")
    notes = "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)
    return f'<div class="figures">{_charts(runs) if runs else ""}{notes}</div>'


@lru_cache(maxsize=16)
def _read(root: Path, written: tuple[int, int]) -> _Run:
    """Read a run as it is now; `written` tells a file from what it was before. Raises InputError."""
    curves, sketches = read_curves(root), {}
    for key, name in (("sketch_top1", "top 1"), ("sketch_top5", "top 5")):
        lines = [*newest_lines(root / METRICS_FILE, key)][::-1]
        points = [(line["tokens"], line[key]) for line in lines if line.keys() >= {"tokens", key}]
        sketches[name] = np.array(points, float).reshape(-1, 2)
    return _Run(curves, sketches)


def _charts(runs: dict[str, _Run]) -> str:
    losses, rates, accuracies = list[Series](), list[Series](), list[Series]()
    alone = len(runs) == 1
    for color, (name, (curves, sketches)) in enumerate(runs.items()):
        of = "" if alone else f"{name}: "
        if curves.half_window:
            losses.append(Series("", color, *thinned(curves.tokens, curves.loss, columns=_COLUMNS), "pale"))
        means = thinned(curves.tokens, curves.smoothed(curves.loss), columns=_COLUMNS)
        losses.append(Series(f"{of}training", color, *means))
        if len(curves.valid_loss):
            other = color if not alone else color + 1
            losses.append(Series(f"{of}validation", other, curves.valid_tokens, curves.valid_loss, "dots"))
        rates.append(Series("" if alone else name, color, *thinned(curves.tokens, curves.lr, columns=_COLUMNS)))
        for number, (which, points) in enumerate(sketches.items()):
            if len(points):
                place = number if alone else color
                accuracies.append(Series(f"{of}{which}", place, points[:, 0], points[:, 1], "line"))
                accuracies.append(Series("", place, points[:, 0], points[:, 1], "dots"))
    end = max(float(run.curves.tokens[-1]) for run in runs.values())
    x = Axis(0, end, [(tick, short(tick)) for tick in ticks(0, end)])
    charts = [line_chart("Loss, in nats a token, against tokens", losses, x, _fitted(losses))]
    if accuracies:
        whole = Axis(0, 1, [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)])
        charts.append(line_chart("Drawings that it recognises", accuracies, x, whole))
    highest = max(float(np.nanmax(np.asarray(one.y), initial=0)) for one in rates)
    charts.append(
        line_chart("Learning rate", rates, x, Axis(0, highest, [(t, f"{t:g}") for t in ticks(0, highest, 3)]))
    )
    return "".join(charts)


def _fitted(series: list[Series]) -> Axis:
    """Return an axis for all values of `series`."""
    values = np.concatenate([np.asarray(one.y, float) for one in series])
    values = values[np.isfinite(values)]
    lowest, highest = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.03 * (highest - lowest) or 0.5
    start, end = max(0.0, lowest - room), highest + room
    return Axis(start, end, [(tick, f"{tick:g}") for tick in ticks(start, end)])


def _facts(run: _Run) -> str:
    curves = run.curves
    facts = [f"step {int(curves.steps[-1]):,}", f"{short(curves.tokens[-1])} tokens"]
    if np.isfinite(curves.loss).any():
        facts.append(f"training loss {curves.smoothed(curves.loss)[np.isfinite(curves.loss)][-1]:.3f}")
    if len(curves.valid_loss):
        facts.append(f"validation loss {curves.valid_loss[-1]:.3f}")
    facts += [f"{name} {points[-1, 1]:.1%}" for name, points in run.sketches.items() if len(points)]
    return ", ".join(facts)
