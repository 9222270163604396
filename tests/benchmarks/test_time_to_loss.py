"""benchmarks/time_to_loss.py finds the best rate inside its sweep, and reads off when a loss was reached. Nothing trains."""

import argparse
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import time_to_loss  # noqa: E402

sys.path.pop()  # its generation.py would hide tests/generation
TOKENS = 160 * 8 * 128
BEST = {"AdamW": 0.001, "Muon": 0.016, "Muon + wsd": 0.09}


def falls_to(run: time_to_loss.Run) -> float:
    return 3 + abs(math.log2(run.rate / BEST[run.recipe])) + (run.recipe == "AdamW")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[time_to_loss.Run]:
    """The runs asked for. Losses fall on a straight line from 7, and end lower the nearer the rate is to BEST."""
    runs: list[time_to_loss.Run] = []

    def train(folder: Path, run: time_to_loss.Run, only_found: bool) -> time_to_loss.Curve:
        runs.append(run)
        return [(eighth * TOKENS // 8, 7 + (falls_to(run) - 7) * eighth / 8) for eighth in range(9)]

    monkeypatch.setattr(time_to_loss, "train", train)
    return runs


def test_a_sweep_goes_on_until_the_best_rate_is_inside_and_no_run_is_made_twice(trained: list, tmp_path: Path) -> None:
    starts = dict(time_to_loss.FIRST_RATES)
    found = time_to_loss.measure(tmp_path, time_to_loss.comparison("english/5M/160/3"), starts)
    for recipe, best in BEST.items():
        measured = found["recipes"][recipe]
        assert abs(math.log2(measured["rate"] / best)) <= 0.25, "the grid's steps are factors of sqrt(2)"
        assert starts[recipe] == measured["rate"]
        rates, losses = list(map(float, measured["sweep"])), list(measured["sweep"].values())
        assert rates == sorted(rates)
        assert min(losses) not in (losses[0], losses[-1])
        assert {run.seed for run in trained if run.rate == measured["rate"]} == {1, 2, 3}
    assert len(trained) == len(set(trained))


def test_a_loss_is_reached_between_two_validations(trained: list, tmp_path: Path) -> None:
    found = time_to_loss.measure(tmp_path, time_to_loss.comparison("english/1M/160/1"), dict(BEST))
    # AdamW falls from 7 to 4, and Muon to 3: it is at 4 after three quarters of the tokens.
    assert found["recipes"]["AdamW"]["reached"] == [pytest.approx(TOKENS)]
    assert found["recipes"]["Muon"]["reached"] == [pytest.approx(0.75 * TOKENS)]
    assert time_to_loss.reached(2.9, [(0, 7.0), (100, 3.0)]) is None
    results = {
        "date": "", "hardware": "", "torch": "", "command": "", "comparisons": [found],
        "seconds": {"1M": {"AdamW": [1.0, 2.0, 9.0], "Muon": [1.5, 3.0, 90.0]}},
    }  # fmt: skip
    table = time_to_loss.table(results)
    assert "| english, 1M, 160 | Muon | 1 | 0.0160 | 3.000 | 75% | 112% |" in table, "1.5 times the time per update"
    time_to_loss.plot(results, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


@pytest.mark.parametrize("words", ["english/2M/160/3", "french/1M/160/3", "english/1M/160", "english/1M/8/1"])
def test_a_comparison_is_corpus_size_updates_and_seeds(words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{words}: choose CORPUS/SIZE/UPDATES/SEEDS"):
        time_to_loss.comparison(words)
