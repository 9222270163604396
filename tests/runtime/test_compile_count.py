"""XLA compiles one training step and one validation step, ever, and the loop never waits for the device; the log tells."""

import json
import re
from pathlib import Path

import pytest
from conftest import SMALL_RUN, metrics, run_xla, succeed

STEPS, VALID_INTERVAL, SAVE_INTERVAL, VALID_BATCHES = 60, 15, 20, 3


@pytest.fixture(
    scope="module",
    params=[
        "--use-syncfree-optim --neftune-alpha 5",
        *(pytest.param(flags, marks=pytest.mark.slow) for flags in ("--no-use-syncfree-optim", "--optim-type muon")),
    ],
)
def counts(request: pytest.FixtureRequest, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a run whose learning rate falls to exactly 0, past where 1 - rate * decay rounds to 1: both are traps."""
    folder = tmp_path_factory.mktemp("counted")
    flags = [
        "--train-steps", STEPS, "--decay-steps", 40, "--valid-interval", VALID_INTERVAL, "--save-interval", SAVE_INTERVAL,
        *request.param.split(), "--min-lr", 0, "--checkpoints-dir", folder,
    ]  # fmt: skip
    result = run_xla(*data_flags, *SMALL_RUN, *flags, program="tests/workers/compile_count_worker.py")
    *shown, last = succeed(result).splitlines()
    moments = 3 if "muon" in request.param else 2
    return json.loads(last) | {"folder": folder, "shown": shown, "errors": result.stderr, "moments": moments}


def test_sixty_steps_with_validation_and_saves_compile_two_graphs(counts: dict) -> None:
    assert counts["end"]["compiles"] == 2
    assert [line["compiles"] for line in training_lines(counts["folder"])][-1] == 2, "the log says so too"


def test_compiles_are_announced_once_and_nothing_is_warned_of(counts: dict) -> None:
    shown = [line for line in counts["shown"] if "compil" in line]
    assert len(shown) == 4
    for step, (before, after) in zip(("training", "validation"), (shown[:2], shown[2:]), strict=True):
        assert before == f"compiling the {step} step (on a TPU this takes minutes) ..."
        assert re.fullmatch(rf"the {step} step is compiled: [0-9.]+ s, 1 new program", after)
    assert "warning: XLA" not in counts["errors"]


def test_the_log_tells_the_time_of_tracing(counts: dict) -> None:
    """A step cannot be traced in less than no time, nor in longer than it took from the one before to the one after."""
    lines = training_lines(counts["folder"])
    assert all(line["trace_ms"] > 0 for line in lines)
    seconds = sum(line["trace_ms"] for line in lines[2:]) / 1e3
    assert seconds <= lines[-1]["time"] - lines[0]["time"]


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
    assert counts["end"]["fallbacks"] == 0
    reads_per_save = 2 + counts["moments"]  # weights, the step count
    assert counts["end"]["reads"] == STEPS + validations * VALID_BATCHES + saves * reads_per_save


@pytest.mark.slow
def test_later_compiles_are_warned_of_once_for_each_cause(data_flags: list[str], tmp_path: Path) -> None:
    """The worker makes XLA compile again for four causes, each twice."""
    small = ["--num-layers", 1, "--gradient-accum-step", 1, "--save-interval", 5]  # it compiles a dozen programs
    flags = [*data_flags, *SMALL_RUN, *small, "--checkpoints-dir", tmp_path]
    result = run_xla(*flags, program="tests/workers/recompile_worker.py")
    succeed(result)
    warnings = [line for line in result.stderr.splitlines() if "warning: XLA compiled again" in line]
    expected = [
        "in the training step, call 4: a batch of (2, 16) where the one before was (4, 16)",
        "in the training step, call 7: the host did some of the step's work: aten::_local_scalar_dense (a value was read",
        "in the saving, call 2: the traced program is another one",
        "in the training step, call 12: the traced program is another one, at the same batch shape",
    ]
    assert len(warnings) == len(expected), result.stderr
    for warning, text in zip(warnings, expected, strict=True):
        assert text in warning
    assert training_lines(tmp_path)[-1]["compiles"] >= 2 + 2 * len(expected)


@pytest.mark.slow
def test_the_compile_cache_is_opened_in_time_on_a_tpu(data_flags: list[str], tmp_path: Path) -> None:
    """On a CPU that takes itself for a TPU until it has opened the cache: the compiled programs are stored there."""
    flags = [*data_flags, *SMALL_RUN, "--train-steps", 1, "--checkpoints-dir", tmp_path / "c"]
    succeed(run_xla(*flags, "--compile-cache", tmp_path / "cache", program="tests/workers/compile_cache_worker.py"))
    (folder,) = (tmp_path / "cache").glob("*/process-0")
    assert len(list(folder.iterdir())) == 2
    succeed(
        run_xla(*flags, "--resume", "never", "--checkpoints-dir", tmp_path / "d", "--compile-cache", tmp_path / "no")
    )
    assert not (tmp_path / "no").exists(), "a CPU could not load what it stored"


def training_lines(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if "loss" in line]
