"""XLA compiles one training step and one validation step, ever, and the loop never waits for the device."""

import json
from pathlib import Path

import pytest
from conftest import SMALL_RUN, run_xla, succeed

STEPS, VALID_INTERVAL, SAVE_INTERVAL, VALID_BATCHES = 60, 15, 20, 3


@pytest.fixture(scope="module", params=["--use-syncfree-optim", "--no-use-syncfree-optim"])
def counts(request: pytest.FixtureRequest, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a run whose learning rate falls to exactly 0, past where 1 - rate * decay rounds to 1: both are traps."""
    folder = tmp_path_factory.mktemp("counted")
    flags = [
        "--train-steps", STEPS, "--decay-steps", 40, "--valid-interval", VALID_INTERVAL, "--save-interval", SAVE_INTERVAL,
        request.param, "--min-lr", 0, "--checkpoints-dir", folder,
    ]  # fmt: skip
    result = run_xla(*data_flags, *SMALL_RUN, *flags, program="tests/compile_count_worker.py")
    return json.loads(succeed(result).splitlines()[-1]) | {"folder": str(folder)}


def test_sixty_steps_with_validation_and_saves_compile_two_graphs(counts: dict) -> None:
    assert counts["end"]["compiles"] == 2
    last = [json.loads(line) for line in (Path(counts["folder"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["compiles"] for line in last if "compiles" in line][-1] == 2, "the log says so too"


def test_each_step_is_one_execution(counts: dict) -> None:
    validations = STEPS // VALID_INTERVAL
    assert counts["end"]["executions"] == STEPS + validations * VALID_BATCHES


def test_the_loop_never_reads_the_device(counts: dict) -> None:
    """Values are read once a step, packed into one tensor, by another thread; no operation falls back to the host."""
    assert counts["readers"] == ["reader"]
    for done, (before, after) in enumerate(zip(counts["steps"], counts["steps"][1:], strict=False), start=1):
        if done % VALID_INTERVAL and done % SAVE_INTERVAL:
            assert after["fallbacks"] == before["fallbacks"], f"step {done + 1}"
            assert after["reads"] - before["reads"] <= 2, f"step {done + 1}"
    saves, validations = STEPS // SAVE_INTERVAL, STEPS // VALID_INTERVAL
    assert counts["end"]["fallbacks"] == saves, "the step count that a save stores"
    reads_per_save = 4  # weights, two moments, the step count
    assert counts["end"]["reads"] == STEPS + validations * VALID_BATCHES + saves * reads_per_save
