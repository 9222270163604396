"""Every schedule against a plain formula, over all steps of some runs; and the options that it does not use are refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from gpt2xla.config import OptimConfig, RunConfig
from gpt2xla.config.options import Share
from gpt2xla.errors import InputError
from gpt2xla.optim.schedule import changed_decay, check_final_decay, describe, learning_rate, past_decay

# Peak and final rate.
A, B = 0.1, 0.01


def rates(method: str, steps: int, more: int = 0, **options: Any) -> list[float]:
    config = OptimConfig(learning_rate=A, min_lr=B, decay_method=method, **options)  # type: ignore[arg-type]
    return [learning_rate(config.over(steps), 512, step) for step in range(steps + more)]


# Rates by plain formulas of i, the number of the update from 0, with w steps of warm-up and d of decay, in a run of e.
def cosine(i: int, w: int, d: int, e: int) -> float:
    return B if i >= d else B + (A - B) * (1 + math.cos(math.pi * (i - w) / (d - w))) / 2


def linear(i: int, w: int, d: int, e: int) -> float:
    return B if i >= d else A - (A - B) * (i - w) / (d - w)


def wsd(i: int, w: int, d: int, e: int) -> float:
    return A if i < e - d or d == 0 else A - (A - B) * math.sqrt(min(1, (i - (e - d)) / d))


def wsd_linear(i: int, w: int, d: int, e: int) -> float:
    return A if i < e - d or d == 0 else A - (A - B) * min(1, (i - (e - d)) / d)


def constant(i: int, w: int, d: int, e: int) -> float:
    return A


def inverse_sqrt(i: int, w: int, d: int, e: int) -> float:
    falling = A * math.sqrt(max(1, w) / (i + 1))
    if i <= e - d or d == 0:
        return falling
    top = A * math.sqrt(max(1, w) / (e - d + 1))
    return B + (top - B) * (1 - math.sqrt(min(1, (i - (e - d)) / d)))


FORMULAS: dict[str, tuple[Callable[[int, int, int, int], float], str, dict[str, str]]] = {
    "cosine": (cosine, "cosine", {}),
    "linear": (linear, "linear", {}),
    "wsd": (wsd, "wsd", {}),
    "wsd, linear": (wsd_linear, "wsd", {"decay_shape": "linear"}),
    "constant": (constant, "constant", {}),
    "inverse-sqrt": (inverse_sqrt, "inverse-sqrt", {}),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    ("steps", "warmup", "decay"),
    [(200, 10, 110), (200, 0, 40), (200, 10, 0), (200, 60, 140), (200, 199, 1), (7, 1, 2), (1, 0, 1), (1, 0, 0)],
)
def test_all_steps_follow_the_formula(name: str, steps: int, warmup: int, decay: int) -> None:
    formula, method, options = FORMULAS[name]
    if method in ("cosine", "linear"):
        decay = warmup + max(1, decay)  # there it is the step at which the decay ends, and 0 of them are refused
    decays = {} if method == "constant" else {"decay_steps": decay}
    found = rates(method, steps, more=20, warmup_steps=warmup, **options, **decays)
    expected = [
        A * (i + 1) / warmup if i < warmup else formula(i, warmup, decay if decays else 0, steps)
        for i in range(steps + 20)
    ]
    assert found == pytest.approx(expected, rel=1e-12)


def test_noam_follows_the_formula() -> None:
    for warmup in (0, 1, 100):
        found = rates("noam", 300, warmup_steps=warmup)
        w = max(1, warmup)
        assert found == pytest.approx([A * 512**-0.5 * min(n**-0.5, n * w**-1.5) for n in range(1, 301)], rel=1e-12)


def test_known_points() -> None:
    """Written out by hand, so that formula and test are not wrong in the same way."""
    found = rates("wsd", 100, more=1, warmup_steps=10, decay_steps=16)
    assert found[:10] == pytest.approx([0.01 * n for n in range(1, 11)])
    assert set(found[10:85]) == {0.1}
    assert found[88] == pytest.approx(0.01 + 0.09 / 2), "a quarter of the way: 1 - sqrt(1/4)"
    assert found[93] == pytest.approx(0.01 + 0.09 / 4), "9/16 of the way: 1 - 3/4"
    assert found[100] == pytest.approx(0.01)
    assert rates("linear", 100, warmup_steps=0)[50] == pytest.approx(0.055)
    found = rates("inverse-sqrt", 400, warmup_steps=25)
    assert (found[24], found[99], found[399]) == pytest.approx((0.1, 0.05, 0.025))
    found = rates("cosine", 200, warmup_steps=10, decay_steps=110)
    assert found[35] == pytest.approx(0.01 + 0.09 * (1 + math.sqrt(0.5)) / 2), "cos(pi / 4)"


def test_decaying_now_is_the_run_of_that_length_from_the_rate_it_has() -> None:
    for method in ("wsd", "inverse-sqrt"):
        now = rates(method, 60, warmup_steps=4, decay_steps=30, decay_now=20)
        assert now == rates(method, 60, warmup_steps=4, decay_steps=20)
        assert now[:40] == rates(method, 1000, warmup_steps=4, decay_steps=30)[:40], "until it begins"
    assert rates("constant", 60, warmup_steps=4, decay_now=20) == rates("wsd", 60, warmup_steps=4, decay_steps=20)


def test_warm_up_and_decay_follow_the_runs_length_unless_they_are_set() -> None:
    for steps, warmup in ((20_000, 750), (2000, 75), (60, 2), (1, 0)):
        found = OptimConfig().over(steps)
        assert (found.warmup_steps, found.decay_steps) == (warmup, steps)
        assert OptimConfig(decay_method="wsd").over(steps).decay_steps == round(steps / 5)
        assert OptimConfig(decay_method="inverse-sqrt").over(steps).decay_steps == 0
        assert OptimConfig(decay_method="noam").over(steps).warmup_steps == 750
    found = OptimConfig(warmup_steps=5, decay_steps=30).over(60)
    assert (found.warmup_steps, found.decay_steps) == (5, 30)
    assert past_decay(found.over(30)) == ""
    assert "stays at 6.00e-05 from step 30 to 60" in past_decay(found)
    shares = OptimConfig(warmup_steps=Share("5%"), decay_steps=Share("0.5%"), decay_method="wsd")
    assert [(c.warmup_steps, c.decay_steps) for c in (shares.over(1000), shares.over(200))] == [(50, 5), (10, 1)]
    assert RunConfig(optim=shares).to_flat()["warmup_steps"] == 1000, "of the default 20,000"


def test_what_a_method_does_not_use_is_refused() -> None:
    for method, names in {
        "cosine": ["decay_shape", "decay_now"],
        "linear": ["decay_shape"],
        "constant": ["decay_steps"],
        "noam": ["min_lr", "decay_steps", "decay_shape"],
    }.items():
        for name in names:
            value = {"decay_shape": "linear", "min_lr": 1e-5}.get(name, 100)
            resume = {"resume": "step-00000010"} if name == "decay_now" else {}
            flag = f"--{name.replace('_', '-')}"
            with pytest.raises(InputError, match=f"{flag} has no meaning with --decay-method {method}; leave it out"):
                RunConfig.from_flat({"decay_method": method, name: value} | resume).check_schedule()
    for method in ("cosine", "linear", "wsd"):
        with pytest.raises(InputError, match=r"--min-lr 0.1 is above --learning-rate"):
            RunConfig.from_flat({"decay_method": method, "min_lr": 0.1}).check_schedule()


def test_a_decay_that_does_not_fit_or_would_rise_is_refused() -> None:
    for method in ("wsd", "inverse-sqrt"):
        run = RunConfig.from_flat({"decay_method": method, "train_steps": 100, "warmup_steps": 30, "decay_steps": 71})
        fix = "--warmup-steps 30 and --decay-steps 71 are more than --train-steps 100 together; use fewer, .* 20"
        with pytest.raises(InputError, match=fix):
            run.check_schedule()
    low = OptimConfig(decay_method="inverse-sqrt", warmup_steps=1, decay_steps=100)
    check_final_decay(low.over(150))
    with pytest.raises(InputError, match=r"--min-lr 6e-05 is above the learning rate of 6.00e-06 .* at step 10000"):
        check_final_decay(low.over(10_100))


def test_a_final_decay_that_moves_is_noted() -> None:
    run = OptimConfig(decay_method="wsd", warmup_steps=0, decay_steps=20)
    assert changed_decay(run.over(100), run.over(1000), 80) == "", "it has not begun"
    assert changed_decay(run.over(100), run.over(1000), 100) == (
        "note: the learning rate goes back up from 6.00e-05 to 6.00e-04 after step 100; its final decay is from step 980 to "
        "1,000"
    )
    assert "drops from 6.00e-04 to" in changed_decay(run.over(1000), run.over(100), 90)


def test_schedules_in_words() -> None:
    said = {
        method: describe(OptimConfig(decay_method=method, warmup_steps=10).over(100))  # type: ignore[arg-type]
        for method in ("linear", "wsd", "constant", "inverse-sqrt", "noam")
    }
    assert said == {
        "linear": "warm-up of 10 steps to 6.00e-04, linear decay to 6.00e-05 at step 100",
        "wsd": "warm-up of 10 steps to 6.00e-04, then constant, 1-sqrt decay from step 80 to 6.00e-05 at step 100",
        "constant": "warm-up of 10 steps to 6.00e-04, then constant",
        "inverse-sqrt": "warm-up of 10 steps to 6.00e-04, then falling as 1/sqrt(step)",
        "noam": "warm-up of 10 steps, then as noam's formula",
    }
