"""The search for the largest batch, with a compiler that refuses more than a given number of sequences."""

from typing import Any

import pytest

import gpt2xla.tpu_check.check as checks
from gpt2xla.config import PRESETS, RunConfig, XlaConfig


def search(most: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[int, int, list[int]]:
    """Return the answer, the fewest that were refused, and all numbers that were tried where `most` fit."""
    tried = []

    def check(config: RunConfig, *_: Any) -> dict[str, Any]:
        share = config.train.micro_batch_size // 8
        tried.append(share)
        return {
            "sequences_per_device": share,
            "fits": share <= most,
            "peak_gib": 15.75 * share / most,
            "memory_gib": 15.75,
        }

    monkeypatch.setattr(checks, "check", check)
    config = RunConfig.from_flat(PRESETS["gpt2-medium"] | {"train_batch_size": 8, "gradient_accum_step": 1})
    report = checks.find_batch(config, XlaConfig(), "v5e-8", lambda line: None, **options)
    return report["sequences_per_device"], report["too_many"], tried


@pytest.mark.parametrize("most", [1, 2, 13, 47, 300])
@pytest.mark.parametrize("first", [[], [44, 49], [1, 2], [1000]])
def test_the_most_that_fit_are_found_wherever_the_search_begins(
    most: int, first: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    best, too_many, tried = search(most, monkeypatch, first=first)
    assert (best, too_many) == (most, most + 1)
    assert len(set(tried)) == len(tried)


def test_an_answer_that_still_holds_takes_two_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert search(46, monkeypatch, tolerance=1 / 8, first=[44, 49]) == (44, 49, [44, 49])


def test_numbers_that_cannot_be_the_answer_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    best, too_many, tried = search(40, monkeypatch, tolerance=1 / 8, first=[44, 49])
    assert best <= 40 < too_many <= 44
    assert 49 not in tried
