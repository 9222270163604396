"""Runs whose batch changes: by --batch-ramp, by resuming with another one, and on XLA."""

import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, metrics, run_here, run_xla, succeed
from safetensors.torch import load_file

from gpt2xla.checkpoint import seal

RAMP = ("12:0", "24:3", "8:7")  # with --train-batch-size 4: 3, 6 and 2 micro-steps
PLAIN = SMALL_RUN[: SMALL_RUN.index("--gradient-accum-step")] + SMALL_RUN[SMALL_RUN.index("--eval-batch-size") :]
LENGTH = [*PLAIN, "--valid-interval", "0", "--save-interval", "5"]


@pytest.fixture(scope="module")
def ramp_run(data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An unbroken run of 10 updates, and what it printed."""
    folder = tmp_path_factory.mktemp("ramp")
    flags = [*LENGTH, "--batch-ramp", *RAMP, "--train-steps", 10, "--checkpoints-dir", folder]
    return folder, succeed(run_here("run_pretrain.py", *data_flags, *flags))


def resumed(folder: Path, steps: int, *flags: object) -> str:
    return succeed(run_here("run_pretrain.py", "--checkpoints-dir", folder, "--train-steps", steps, *flags))


def lines(folder: Path) -> list[tuple[float, ...]]:
    names = ("step", "tokens", "loss", "grad_norm", "lr")
    return [tuple(line[name] for name in names) for line in metrics(folder) if "loss" in line]


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = (load_file(folder / "step-00000010" / "model.safetensors") for folder in (a, b))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resumes_with_other_batches_equal_an_unbroken_ramp(
    ramp_run: tuple[Path, str], data_flags: list[str], tmp_path: Path
) -> None:
    folder, _ = ramp_run
    begin = [*LENGTH, "--gradient-accum-step", 3, "--train-steps", 3, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *data_flags, *begin))
    shown = resumed(tmp_path, 7, "--gradient-accum-step", 6)
    assert "\nbatch: 12 sequences per update up to step 3, 24 from there\n" in shown
    assert "batch: 24 sequences per update up to step 7, 8 from there" in resumed(
        tmp_path, 10, "--gradient-accum-step", 2
    )
    assert lines(tmp_path) == lines(folder)
    assert same_weights(tmp_path, folder)
    card = (tmp_path / "step-00000010" / "README.md").read_text()
    assert f"{(3 * 12 + 4 * 24 + 3 * 8) * 16:,} (12, then 24, then 8 sequences a step)" in card
    # Back at an older checkpoint, its own history counts.
    assert "up to step" not in resumed(tmp_path, 5, "--resume", tmp_path / "step-00000003", "--gradient-accum-step", 3)
    assert [line[1] for line in lines(tmp_path)] == [12 * 16 * step for step in range(1, 6)]


def test_a_ramp_is_announced_kept_by_a_resumed_run_and_ended_by_a_plain_batch(
    ramp_run: tuple[Path, str], data_flags: list[str], tmp_path: Path
) -> None:
    folder, shown = ramp_run
    assert "= 12 sequences = 192 tokens per step; 24 after step 3; 8 after step 7\n" in shown
    assert "batch after step 3: 4 sequences x 1 device x 6 micro-steps = 24 sequences = 384 tokens per step\n" in shown
    assert "batch after step 7: 4 sequences x 1 device x 2 micro-steps = 8 sequences = 128 tokens per step\n" in shown
    begin = [*LENGTH, "--batch-ramp", *RAMP, "--train-steps", 5, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *data_flags, *begin))
    assert "up to step" not in resumed(tmp_path, 10)
    assert lines(tmp_path) == lines(folder)
    assert same_weights(tmp_path, folder)
    shown = resumed(tmp_path, 11, "--resume", tmp_path / "step-00000005", "--gradient-accum-step", 1)
    assert "changed: --batch-ramp 12:0 24:3 8:7 -> not set" in shown
    assert "batch: 24 sequences per update up to step 5, 4 from there" in shown
    assert lines(tmp_path)[:5] == lines(folder)[:5]
    assert lines(tmp_path)[-1][1] == (3 * 12 + 2 * 24 + 6 * 4) * 16
    shown = resumed(tmp_path, 13, "--batch-ramp", "8:0", "12:12")
    assert "batch: 4 sequences per update up to step 11, 8 from there" in shown
    assert lines(tmp_path)[-1][1] == (3 * 12 + 2 * 24 + 6 * 4 + 8 + 12) * 16


def test_checkpoints_of_before_resume(ramp_run: tuple[Path, str], data_flags: list[str], tmp_path: Path) -> None:
    """They store one number for the whole run, and no run_config.json names a ramp."""
    begin = [*LENGTH, "--gradient-accum-step", 3, "--train-steps", 3, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *data_flags, *begin))
    checkpoint = tmp_path / "step-00000003"
    training = torch.load(checkpoint / "training_state.pt", weights_only=True)
    assert training["data"].pop("batch") == [[0, 12]]
    training["data"]["--train-batch-size x --gradient-accum-step"] = 12
    torch.save(training, checkpoint / "training_state.pt")
    options = (checkpoint / "run_config.json").read_text()
    (checkpoint / "run_config.json").write_text(re.sub(r'\s*"batch_ramp": null,', "", options))
    seal.seal(checkpoint, 3)
    assert "up to step" not in resumed(tmp_path, 4)
    assert "batch: 12 sequences per update up to step 4, 24 from there" in resumed(
        tmp_path, 5, "--gradient-accum-step", 6
    )
    folder, _ = ramp_run
    assert lines(tmp_path)[:4] == [*lines(folder)[:3], lines(tmp_path)[3]]
    assert [line[1] for line in lines(tmp_path)] == [192, 384, 576, 768, 1152]


def test_drop_last_lets_only_the_micro_steps_change(data_flags: list[str], tmp_path: Path) -> None:
    begin = [*LENGTH, "--drop-last", "--gradient-accum-step", 3, "--train-steps", 1, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *data_flags, *begin))
    assert "up to step 1, 4 from there" in resumed(tmp_path, 2, "--gradient-accum-step", 1)
    result = run_here("run_pretrain.py", "--checkpoints-dir", tmp_path, "--train-steps", 3, "--train-batch-size", 7)
    assert result.returncode == 2
    assert "--drop-last is not what" in result.stderr


@pytest.mark.slow
def test_a_ramp_on_xla_compiles_one_announced_program_more(
    ramp_run: tuple[Path, str], data_flags: list[str], tmp_path: Path
) -> None:
    flags = [*data_flags, *LENGTH, "--batch-ramp", *RAMP[:2], "--train-steps", 6, "--checkpoints-dir", tmp_path]
    result = run_xla(*flags)
    shown = [line for line in succeed(result).splitlines() if re.match("compiling|the .* compiled|batch after", line)]
    expected = [
        "compiling the training step (on a TPU this takes minutes) ...",
        "the training step is compiled: [0-9.]+ s, 1 new program",
        "batch after step 3: 4 sequences x 1 device x 6 micro-steps = 24 sequences = 384 tokens per step",
        r"compiling the training step of 24 sequences \(on a TPU this takes minutes\) ...",
        "the training step of 24 sequences is compiled: [0-9.]+ s, 1 new program",
        "compiling the validation step (on a TPU this takes minutes) ...",
        "the validation step is compiled: [0-9.]+ s, 1 new program",
    ]
    assert len(shown) == len(expected)
    for line, pattern in zip(shown, expected, strict=True):
        assert line == pattern or re.fullmatch(pattern, line)
    assert "warning: XLA" not in result.stderr
    assert [line["compiles"] for line in metrics(tmp_path) if "loss" in line] == [1, 1, 1, 2, 2, 2]
    losses = [[line[2] for line in lines(folder)[:6]] for folder in (tmp_path, ramp_run[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
