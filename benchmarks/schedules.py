"""Draws the learning-rate schedules, `results/schedules.png` of docs/schedules.md: python benchmarks/schedules.py

The curves are the trainer's own function, not a copy of its formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from gpt2xla.config import OptimConfig
from gpt2xla.optim.schedule import learning_rate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUTPUT = Path(__file__).parent / "results" / "schedules.png"
STEPS, WARMUP, D_MODEL = 2000, 150, 768
PEAK, FINAL = 6e-4, 6e-5
_BLUE, _ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito
# The panels: a method, its other options, and the steps from which --decay-now 300 is drawn.
PANELS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("cosine", {}, ()),
    ("linear", {}, ()),
    ("wsd", {}, (800,)),
    ("constant", {}, (800, 1400)),
    ("inverse-sqrt", {}, (800,)),
    ("noam", {"learning_rate": PEAK * (D_MODEL * WARMUP) ** 0.5}, ()),
]


def main() -> None:
    figure, panels = plt.subplots(2, 3, figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained")
    for axes, (method, options, decays) in zip(panels.flat, PANELS, strict=True):
        config = OptimConfig(
            decay_method=method, warmup_steps=WARMUP, **{"learning_rate": PEAK, "min_lr": FINAL} | options
        )  # type: ignore[arg-type]
        for start in decays:
            _draw(axes, config, range(start, start + 301), start + 300, color=_ORANGE, ls="--", decay_now=300)
        _draw(axes, config, range(STEPS), STEPS, color=_BLUE)
        axes.set_title(method, fontsize=10)
        axes.set_yticks([0, FINAL, PEAK], ["0", "--min-lr", "--learning-rate"])
        axes.set_xticks([0, STEPS], ["0", "--train-steps"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(OUTPUT, dpi=110)


def _draw(axes: Any, config: OptimConfig, steps: range, end: int, *, decay_now: int | None = None, **look: Any) -> None:
    schedule = replace(config, decay_now=decay_now).over(end)
    axes.plot(steps, [learning_rate(schedule, D_MODEL, step) for step in steps], **look)


if __name__ == "__main__":
    main()
