"""The picture of several models' figures side by side. matplotlib, the extra `plot`, is needed here only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from gpt2xla.logs.loss_picture import RC, Look, content_of, shortened

CHANCE = 0.25  # what guessing gives where there are four answers
_MOST_LABELLED = 4  # models: the numbers of more would overlap
_LETTERS_A_LINE = 12


def draw(
    models: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[tuple[float, float | None]]]], kind: str
) -> bytes:
    """Return the picture as the content of a file of `kind` png, svg or pdf: a panel for each label of an axis, in it a
    group of bars for each figure, and in that a bar for each model, with its value and standard error."""
    groups = [len(figures) for figures in panels.values()]
    with matplotlib.rc_context({**RC, "axes.axisbelow": True}):
        figure = Figure(figsize=(max(6.0, 2.0 + 1.1 * sum(groups)), 5), dpi=120, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=groups)[0]
        for of, (label, figures) in zip(axes, panels.items(), strict=True):
            handles = _draw_panel(of, label, figures, len(models))
        names = [f" {shortened(model, 60)}" for model in models]
        legend = figure.legend(
            handles, names, loc="outside upper left", fontsize=9, ncols=1 if max(map(len, names)) > 30 else 3
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may hold dollars
        note = "Whiskers: the standard error." + (" Dashed line: guessing." if "Accuracy" in panels else "")
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8, color="#555555")
        return content_of(figure, kind)


def _draw_panel(
    axes: Any, label: str, figures: Mapping[str, Sequence[tuple[float, float | None]]], models: int
) -> list[Any]:
    """Draw the bars, and return those of each model."""
    width, drawn = 0.8 / models, []
    for model in range(models):
        values = [of[model][0] for of in figures.values()]
        places = [group + (model - (models - 1) / 2) * width for group in range(len(figures))]
        errors = [of[model][1] or 0.0 for of in figures.values()]
        drawn.append(axes.bar(places, values, width * 0.92, color=Look(model).color))
        axes.errorbar(places, values, errors, fmt="none", ecolor="#333333", capsize=2, elinewidth=1)
        if models <= _MOST_LABELLED:
            for place, value, error in zip(places, values, errors, strict=True):
                axes.annotate(
                    f"{value:.3f}", (place, value + error), (0, 3), textcoords="offset points", ha="center", fontsize=7,
                    bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.3},
                )  # fmt: skip
    axes.set_xticks(range(len(figures)), [_in_lines(name) for name in figures], fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(label)
    if label == "Accuracy":
        axes.axhline(CHANCE, color="#555555", ls=(0, (5, 3)), lw=1, zorder=0)
    return drawn


def _in_lines(name: str) -> str:
    lines = [""]
    for word in name.replace("_", " ").split():
        if lines[-1] and len(lines[-1]) + len(word) >= _LETTERS_A_LINE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
