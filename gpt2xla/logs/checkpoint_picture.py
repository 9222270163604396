"""The picture of the losses of checkpoints on one split. matplotlib, the extra `plot`, is needed here only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gpt2xla.logs.loss_picture import RC, Look, content_of, shortened
from gpt2xla.logs.sinks import with_error


@dataclass(frozen=True)
class Point:
    """A model that was measured."""

    name: str  # as the user gave it
    run: str | None  # the folder of its run; None if it is no checkpoint of one
    step: int
    loss: float  # in nats per token
    standard_error: float | None


def draw(points: Sequence[Point], split: str, kind: str, *, names_best: bool = True) -> bytes:
    """Return the picture as the content of a file of `kind` png, svg or pdf: a curve for each run, with the standard error
    of each loss, a line across for each model that is no checkpoint, and the name of the best."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(point.run or point.name, []).append(point)
    for curve in curves.values():
        curve.sort(key=lambda point: point.step)
    best = min(points, key=lambda point: point.loss) if names_best else None
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        axes = figure.subplots()
        for number, (name, curve) in enumerate(curves.items()):
            look, losses = Look(number), [point.loss for point in curve]
            label = f" {shortened(name, 50)}"
            if curve[0].run is None:
                axes.axhline(losses[0], label=label, **look.line())
                continue
            errors = [point.standard_error or 0.0 for point in curve]
            style = look.line() | look.marker(len(curve))
            axes.errorbar(
                [point.step for point in curve], losses, errors, label=label, capsize=3, elinewidth=1, **style
            )
        if best and best.run is not None:
            axes.plot(best.step, best.loss, "o", ms=14, mfc="none", mec="#000000", mew=1.2, zorder=5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        title, note = f"Loss on {shortened(split, 66)}", "Bars: the standard error of the loss."
        if best:
            at = "" if best.run is None else f", step {best.step:,}"
            title += f"\nbest: {shortened(best.run or best.name, 50)}{at}, {with_error(best.loss, best.standard_error)}"
            note += " Ring: the lowest loss."
        axes.set_title(title, loc="left", fontsize=11, parse_math=False)
        if len(curves) > 1:
            for text in axes.legend(loc="best", fontsize=9, handlelength=4).get_texts():
                text.set_parse_math(False)  # a name may hold dollars
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8, color="#555555")
        return content_of(figure, kind)
