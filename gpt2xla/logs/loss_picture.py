"""The picture of the losses of one or more runs. matplotlib, the extra `plot`, is needed here only.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind readers tell apart. Runs differ in
line style, width and marker too, so that equal curves show through each other.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from gpt2xla.logs.run_curves import Curves, names_of, short, thinned

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES: tuple[Any, ...] = ("-", (0, (5, 2.5)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
_WIDTHS, _MARKERS, _SIZES = (2.3, 1.8, 1.6, 1.3), "osD^", (7, 5.5, 4.5, 4.5)
_MOST_ROWS, _LONGEST_ROW = 6, 55  # of a legend inside the picture; a larger one is below it
_LABEL_HEIGHT = 12  # of a validation loss, in points
RC = {"pdf.fonttype": 42, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}


def draw(runs: Sequence[Curves], kind: str, *, log_x: bool = False, more: bool = False) -> bytes:
    """Return the picture as the content of a file of `kind` png, svg or pdf. With `more`, it also shows the learning rate
    and the gradient norm."""
    names = names_of([run.file for run in runs])
    rows = [f"{shortened(name, 50)} ({_facts(run)})" for name, run in zip(names, runs, strict=True)]
    is_below = len(runs) > 1 and (len(rows) > _MOST_ROWS or max(map(len, rows)) > _LONGEST_ROW)
    height = 5.0 + (3.0 if more else 0) + (0.22 * len(rows) if is_below else 0)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
        panels: Any = figure.subplots(3 if more else 1, 1, sharex=True, height_ratios=[4, 1, 1.4] if more else [1])
        loss, *others = list(panels) if more else [panels]
        looks = [Look(number) for number in range(len(runs))]
        for run, look in zip(runs, looks, strict=True):
            _draw_curve(loss, run, run.loss, look, log_x)
            loss.plot(run.valid_tokens, run.valid_loss, ls="", zorder=4, **look.marker(len(run.valid_tokens)))
            skipped = run.skipped
            loss.plot(
                skipped, np.full(len(skipped), 0.015), "x", color=look.color, transform=loss.get_xaxis_transform()
            )
            if others:
                others[0].plot(*thinned(run.tokens, run.lr, log_x), **look.line())
                _draw_curve(others[1], run, run.grad_norm, look, log_x)
        _label_axes(loss, others, runs, log_x)
        title = (
            [shortened(names[0], 76), _facts(runs[0], steps=True)] if len(runs) == 1 else [f"Loss of {len(runs)} runs"]
        )
        loss.set_title("\n".join(title), loc="left", fontsize=11, parse_math=False)
        if len(runs) > 1:
            handles = [Line2D([], [], **look.line(), **look.marker(1)) for look in looks]
            target, place = (figure, "outside lower left") if is_below else (loss, "best")
            legend = target.legend(
                handles, [f" {row}" for row in rows], loc=place, fontsize=9, handlelength=4, alignment="left"
            )
            for text in legend.get_texts():
                text.set_parse_math(False)  # a name may hold dollars
        if is_below:
            legend.set_title(_caption(runs), FontProperties(size=8))
        else:
            figure.supxlabel(_caption(runs), x=0.012, ha="left", fontsize=8, color="#555555")
        figure.draw_without_rendering()  # settles where the points are
        _label_last_validations(loss, runs, looks)
        return content_of(figure, kind)


def content_of(figure: Figure, kind: str) -> bytes:
    """Return the picture as the content of a file of `kind` png, svg or pdf."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=120)
    return content.getvalue()


class Look:
    """How run number `number` is drawn."""

    def __init__(self, number: int) -> None:
        self.color, self._style = _COLORS[number % len(_COLORS)], number % len(_STYLES)
        self._width = _WIDTHS[self._style] * 0.6 ** (number // len(_STYLES))

    def line(self) -> dict[str, Any]:
        return {"color": self.color, "ls": _STYLES[self._style], "lw": self._width}

    def marker(self, count: int) -> dict[str, Any]:
        size, edge = (_SIZES[self._style], 0.8) if count <= 40 else (4, 0)
        return {"marker": _MARKERS[self._style], "ms": size, "mfc": self.color, "mec": "white", "mew": edge}


def _draw_curve(axes: Any, run: Curves, values: np.ndarray, look: Look, log_x: bool) -> None:
    """Draw each step pale, and the smoothed curve over it. No line goes over steps that are missing."""
    means, gaps = run.smoothed(values), np.flatnonzero(np.diff(run.steps) != 1) + 1
    tokens = np.insert(run.tokens, gaps, run.tokens[gaps])
    if run.half_window:
        pale = np.insert(values, gaps, np.nan)
        axes.plot(*thinned(tokens, pale, log_x), color=look.color, alpha=0.35, lw=0.8, zorder=1)
    axes.plot(*thinned(tokens, np.insert(means, gaps, np.nan), log_x), zorder=3, **look.line())
    known = np.concatenate([[False], np.isfinite(means), [False]])
    alone = known[1:-1] & ~known[:-2] & ~known[2:]  # no line goes through these
    axes.plot(run.tokens[alone], means[alone], ".", color=look.color, ms=6, zorder=3)


def _label_axes(loss: Any, others: Sequence[Any], runs: Sequence[Curves], log_x: bool) -> None:
    bottom = others[-1] if others else loss
    per_step = {
        round(tokens / step) for run in runs for tokens, step in zip(run.tokens[-1:], run.steps[-1:], strict=True)
    }
    bottom.set_xlabel(f"tokens ({per_step.pop():,} per step)" if len(per_step) == 1 else "tokens")
    loss.set_ylabel("loss (nats per token)")
    if log_x:
        loss.set_xscale("log")
    if others:
        others[0].set_ylabel("learning rate", fontsize=9)
        others[1].set_ylabel("gradient norm", fontsize=9)
        loss.figure.align_ylabels()
        others[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        norms = np.concatenate([run.grad_norm for run in runs])
        if np.nanmax(norms, initial=0) > 5 * np.nanmin(norms, initial=np.inf) > 0:
            others[1].set_yscale("log")
            others[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            others[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            others[1].yaxis.set_minor_locator(NullLocator())
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    first, last = min(run.tokens[0] for run in runs), max(run.tokens[-1] for run in runs)
    if last > first:  # leaves room for the label of the last validation
        loss.set_xlim(*((first * 0.9, last * (last / first) ** 0.09) if log_x else (0, last * 1.09)))


def _label_last_validations(axes: Any, runs: Sequence[Curves], looks: Sequence[Look]) -> None:
    """Write the loss of each run's last validation: beside its point where the longest run ends, elsewhere below it."""
    measured = [(run, look) for run, look in zip(runs, looks, strict=True) if len(run.valid_loss)]
    last = sorted(((run.valid_loss[-1], run.valid_tokens[-1], look) for run, look in measured), key=lambda one: one[:2])
    end = max(run.tokens[-1] for run in runs)

    def label(loss: float, tokens: float, look: Look, offset: tuple[float, float], align: str) -> None:
        axes.annotate(
            f"{loss:.3f}", (tokens, loss), offset, textcoords="offset points", ha=align, va="center", color=look.color,
            fontsize=10, fontweight="bold", zorder=5, bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip

    at_end = [one for one in last if one[1] >= 0.95 * end]
    for one in last:
        if one not in at_end:
            label(*one, (0, -_LABEL_HEIGHT), "center")
    points = 72 / axes.figure.dpi  # per pixel
    heights = [axes.transData.transform((0.5 * end, loss))[1] * points for loss, *_ in at_end]
    floor = axes.bbox.y0 * points + _LABEL_HEIGHT / 2
    for one, height, spread in zip(at_end, heights, _spread(heights, floor), strict=True):
        label(*one, (8, spread - height), "left")


def _spread(heights: Sequence[float], floor: float) -> list[float]:
    """Return the nearest heights, in points, at which labels do not overlap and none is below `floor`; `heights` rise."""
    groups: list[
        list[float]
    ] = []  # labels that touch: each one's height above that of a label at the bottom of a stack
    for number, height in enumerate(heights):
        groups.append([height - number * _LABEL_HEIGHT])
        while len(groups) > 1 and np.mean(groups[-2]) >= np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    bottoms = [max(floor, float(np.mean(group))) for group in groups for _ in group]
    return [bottom + number * _LABEL_HEIGHT for number, bottom in enumerate(bottoms)]


def _caption(runs: Sequence[Curves]) -> str:
    windows = sorted({2 * run.half_window + 1 for run in runs})
    parts = []
    if windows[-1] == 1:
        parts.append("Line: each training step.")
    else:
        steps = " to ".join(f"{window:,}" for window in dict.fromkeys((windows[0], windows[-1])))
        parts.append(f"Pale: each training step. Strong: mean of the {steps} steps around it, fewer at both ends.")
    if any(len(run.valid_loss) for run in runs):
        parts.append("Marked: validation.")
    if any(len(run.skipped) for run in runs):
        parts.append("x: not a number, skipped.")
    return " ".join(parts)


def _facts(run: Curves, steps: bool = False) -> str:
    facts = [] if run.parameters is None else [f"{short(run.parameters)} parameters"]
    facts += [f"{int(run.steps[-1]):,} step{'s' if run.steps[-1] != 1 else ''}"] if steps else []
    return ", ".join([*facts, f"{short(run.tokens[-1])} tokens"])


def shortened(name: str, length: int) -> str:
    """Return `name` without its middle if it is longer than `length`."""
    return name if len(name) <= length else f"{name[: length // 3]}…{name[length // 3 + 1 - length :]}"
