"""The curves of runs: what is drawn is what their metrics hold, also while they are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gpt2xla.playground.run_charts import charts_of, when_written


def write(folder: Path, *lines: dict[str, Any], end: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + end)
    return folder


def training(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": n, "tokens": 100 * n, "loss": loss, "lr": 0.01 / n} for n, loss in enumerate(losses, 1)]


def drawn(*runs: Path) -> str:
    return charts_of({run.name: run for run in runs}, when_written(runs))


def dots(page: str, color: int) -> list[list[tuple[float, float]]]:
    """The dots of each path of a color, as shares of the chart."""
    paths = re.findall(rf'<path class="dots color-{color}" d="([^"]*)"', page)
    return [[(float(x) / 1000, 1 - float(y) / 300) for x, y in re.findall(r"M(\S+) (\S+)h0", path)] for path in paths]


def test_losses_and_recognition_are_drawn_where_they_were_measured(tmp_path: Path) -> None:
    run = write(tmp_path / "<run>", *training(5.0, 4.0, None, 3.0), {"step": 2, "tokens": 200, "valid_loss": 4.5})
    page = drawn(run)
    assert page.count("<figure") == 2
    assert "Drawings" not in page
    assert "&lt;run&gt;: step 4, 400 tokens, training loss 3.000, validation loss 4.500" in page
    start, end = 3 - 0.06, 5 + 0.06  # what the axis shows: all losses, and 3% more on both sides
    assert dots(page, 1) == [[(0.5, pytest.approx((4.5 - start) / (end - start), abs=1e-3))]]
    write(run, {"step": 4, "tokens": 400, "sketch_top1": 0.25, "sketch_top5": 0.75, "sketch_drawings": 8})
    page = drawn(run)
    assert page.count("<figure") == 3, "it was written since"
    assert page.index("Loss") < page.index("Drawings that it recognises") < page.index("Learning rate")
    assert dots(page, 0) == [[(1, pytest.approx(0.25))]]
    assert dots(page, 1)[1:] == [[(1, pytest.approx(0.75))]]
    assert "top 1 25.0%, top 5 75.0%" in page


def test_runs_are_told_apart_and_a_run_that_has_written_nothing_is_a_line(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, *training(*[5.0, 4.0] * 10)) for name in ("a", "b")]
    page = drawn(*runs, tmp_path / "c")
    assert [name in page for name in ("a: training", "b: training")] == [True, True]
    assert re.search(r"c: \S+ cannot be read", page)
    assert "<figure" not in drawn(tmp_path / "c")
    write(runs[0], end='{"step": 21, "tok')
    assert "a: step 20" in drawn(*runs), "the last line is being written"
    write(runs[0], end="no metrics\n")
    assert "does not hold the metrics of a run" in drawn(*runs)
