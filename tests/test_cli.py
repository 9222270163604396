"""The programs as a user runs them: wrong input ends in one clear line and exit code 2, with nothing written."""

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from conftest import (
    ROOT,
    SMALL_RUN,
    metrics,
    require_xla,
    run,
    run_here,
    run_xla,
    succeed,
    told,
    torchrun,
    training_losses,
    write_split,
)

from gpt2xla.chat.options import ChatConfig
from gpt2xla.checkpoint import run_folder
from gpt2xla.checkpoint.loading import load_weights
from gpt2xla.cli import parse_options


def refused(result: subprocess.CompletedProcess[str], *culprits: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if "Gloo" not in line]
    assert len(lines) == 1, result.stderr
    assert "error: " in lines[0]
    for culprit in culprits:
        assert culprit in lines[0]


# Flags added to a run that works -> what the one line must name.
WRONG_FLAGS = {
    "unknown flag": (["--learning-rat", "0.1"], ["--learning-rat is unknown; did you mean --learning-rate?"]),
    "underscores, which are fine": (["--valid_dir", "/no/such/folder"], ["--valid-dir /no/such/folder"]),
    "underscores in a wrong flag": (["--train_dirs", "x"], ["--train_dirs", "did you mean --train-dir?"]),
    "another trainer's flag": (["--lr", "0.1"], ["--lr", "did you mean --learning-rate?"]),
    "one dash": (["-lr", "0.1"], ["-lr", "did you mean --learning-rate?"]),
    "nothing like a flag": (["--zzz"], ["--zzz is unknown (--help lists the flags)"]),
    "the other runner's flag": (["--use-syncfree-optim"], ["--use-syncfree-optim", "run_pretrain_xla.py"]),
    "no value": (["--learning-rate"], ["--learning-rate has no value"]),
    "one value of two": (["--betas", "0.9"], ["--betas takes 2 values"]),
    "a value too many": (["--seed", "1", "2"], ["'2' belongs to no flag"]),
    "a value for a switch": (["--shuffle=true"], ["--shuffle", "takes no value"]),
    "a user that is not there": (["--valid-dir", "~nobody-here"], ["--valid-dir '~nobody-here'"]),
    "not a number": (["--train-steps", "many"], ["--train-steps", "'many'"]),
    "not a choice": (["--mixed-precision", "int8"], ["--mixed-precision", "fp16", "bf16"]),
    "heads do not divide": (["--num-heads", "5"], ["--num-heads 5", "--d-model 32"]),
    "no steps": (["--train-steps", "0"], ["--train-steps 0"]),
    "impossible dropout": (["--dropout", "1.5"], ["--dropout 1.5"]),
    "impossible beta": (["--betas", "0.9", "1.0"], ["--betas 0.9 1.0"]),
    "learning rate not a number": (["--learning-rate", "nan"], ["--learning-rate"]),
    "warm-up outlasts the run": (["--warmup-steps", "20"], ["--warmup-steps 20", "--train-steps 20", "such as 1"]),
    "decay ends in warm-up": (["--warmup-steps", "9", "--decay-steps", "9"], ["--decay-steps 9", "--warmup-steps 9"]),
    "missing shard folder": (["--valid-dir", "/no/such/folder"], ["--valid-dir /no/such/folder", "prepare_text.py"]),
    "folder without shards": (["--valid-dir", "gpt2xla"], ["--valid-dir gpt2xla", ".npy"]),
    "vocabulary too small": (["--vocab-size", "90"], ["--vocab-size 90", "use at least 97"]),
    "sequence longer than the data": (
        ["--valid-dir", "{data}/test", "--seq-length", "501"],
        ["--seq-length 501", "500 tokens"],
    ),
    "missing config file": (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    "unknown checkpoint": (["--from-checkpoint", "./nowhere/at/all"], ["./nowhere/at/all"]),
    "resume from a foreign folder": (["--resume", "gpt2xla"], ["--resume gpt2xla", "COMPLETE"]),
    "resume from nothing": (["--resume", "./step-5"], ["--resume step-5", "no such"]),
    "nothing to test": (["--do-test"], ["--do-test", "--from-checkpoint"]),
    "output is a file": (["--checkpoints-dir", "pyproject.toml"], ["--checkpoints-dir pyproject.toml"]),
    "no output folder": (["--checkpoints-dir", ""], ["--checkpoints-dir is empty"]),
    "unknown tokenizer": (["--tokenizer", "klingon"], ["klingon"]),
    "backend without its devices": (["--ddp-backend", "nccl2"], ["--ddp-backend", "nccl", "gloo"]),
}


@pytest.mark.parametrize(("flags", "culprits"), WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_a_wrong_flag_is_one_line(
    flags: list[str], culprits: list[str], data: Path, data_flags: list[str], tmp_path: Path
) -> None:
    flags = [flag.format(data=data) for flag in flags]
    output = tmp_path / "checkpoints"
    refused(run_here("run_pretrain.py", *data_flags, *SMALL_RUN, "--checkpoints-dir", output, *flags), *culprits)
    assert not output.exists(), "nothing is written before the first step"


def test_a_list_in_parts_is_whole() -> None:
    options = parse_options(ChatConfig, "", ["--input", "a", "b", "--seed", "1", "--input", "c", "--seed", "2"])
    assert (options.input, options.seed) == (("a", "b", "c"), 2)


@pytest.mark.parametrize(
    ("environment", "culprits"),
    [
        ({"PJRT_DEVICE": "CUDA"}, ["PJRT_DEVICE=CUDA", "run_pretrain.py"]),
        ({"PJRT_DEVICE": ""}, ["PJRT_DEVICE"]),
        ({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "two"}, ["CPU_NUM_DEVICES=two"]),
    ],
)
def test_a_wrong_environment_is_one_line(
    environment: dict[str, str], culprits: list[str], data_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_xla()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(run_here("run_pretrain_xla.py", *data_flags, *SMALL_RUN), *culprits)


@pytest.mark.parametrize(
    ("devices", "flags", "culprits"),
    [
        pytest.param(
            "2", ["--train-batch-size", "3"], ["--train-batch-size 3", "2 devices", "4"], marks=pytest.mark.slow
        ),
        pytest.param("1", ["--vocab-size", "90"], ["--vocab-size 90"], marks=pytest.mark.slow),
        pytest.param("2", ["--ddp"], ["--ddp"], marks=pytest.mark.slow),
    ],
)
def test_a_wrong_flag_on_xla_is_one_line_too(
    devices: str, flags: list[str], culprits: list[str], data_flags: list[str], tmp_path: Path
) -> None:
    """By the installed command, whose workers start in another way than a script's."""
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", str(tmp_path / "c"), *flags]
    refused(run_xla(*flags, program="-m gpt2xla train-xla", CPU_NUM_DEVICES=devices), *culprits)


def test_a_flag_that_xla_does_not_know_is_named(data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path / "c"]
    ended = run_xla(*flags, XLA_FLAGS="--xla_nonsense=1")
    assert ended.returncode == 1
    assert "its own message is above; XLA_FLAGS is '--xla_nonsense=1', and" in ended.stderr.splitlines()[-1]


def test_a_batch_that_does_not_divide_is_refused_by_torchrun(data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--train-batch-size", 3, "--checkpoints-dir", tmp_path]
    result = torchrun(2, *flags, program="-m gpt2xla train")
    assert result.returncode != 0
    assert told(result, "--train-batch-size 3 does not divide over 2 devices; use a multiple of 2, such as 4") == 1


def test_a_resume_that_would_lose_or_repeat_data_is_refused(trained: Path, data_flags: list[str]) -> None:
    flags = [*data_flags, *SMALL_RUN, "--train-steps", 40, "--checkpoints-dir", trained]
    refused(run_here("run_pretrain.py", *flags, "--drop-last", "--train-batch-size", 5), "--drop-last", "312, now 310")
    refused(
        run_here("run_pretrain.py", *flags, "--shuffle"), "--shuffle or --seed", "no --shuffle, now --seed 1061109567"
    )
    refused(run_here("run_pretrain.py", *flags, "--d-model", 64), "--d-model 64", "where it is 32")
    refused(run_here("run_pretrain.py", *flags, "--train-steps", 19), "--train-steps 19", "already at step 20")
    refused(run_here("run_pretrain.py", *flags, "--resume", "never"), "--resume never", "step-00000020")


def test_a_finished_run_has_nothing_to_do(trained: Path, data_flags: list[str]) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    assert "nothing to do" in succeed(
        run_here("run_pretrain.py", *data_flags, *SMALL_RUN, "--checkpoints-dir", trained)
    )
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_the_same_batch_may_be_cut_otherwise_on_resume(data_flags: list[str], trained: Path, tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path, "--resume", trained / "step-00000010"]
    succeed(run_here("run_pretrain.py", *flags, "--train-batch-size", 6, "--gradient-accum-step", 2))
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained)[10:], rel=1e-5)


def test_a_run_continued_by_its_folder_alone_is_exact_in_its_own_precision(
    data_flags: list[str], tmp_path: Path
) -> None:
    flags = [*data_flags, *SMALL_RUN, "--mixed-precision", "bf16", "--dropout", "0.1", "--checkpoints-dir"]
    succeed(run_here("run_pretrain.py", *flags, tmp_path / "unbroken"))
    succeed(run_here("run_pretrain.py", *flags, tmp_path / "broken", "--train-steps", 10))
    text = succeed(run("run_pretrain.py", "--checkpoints-dir", tmp_path / "broken", "--train-steps", 20))
    assert "precision: bf16" in text
    assert "changed: --train-steps 10 -> 20" in text
    assert training_losses(tmp_path / "broken") == training_losses(tmp_path / "unbroken")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(precision: str, trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    flags = ["--mixed-precision", precision, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *data_flags, *SMALL_RUN, *flags))
    assert training_losses(tmp_path)[0] == pytest.approx(training_losses(trained)[0], rel=1e-2)
    assert training_losses(tmp_path)[-1] == pytest.approx(training_losses(trained)[-1], abs=0.3)


@pytest.mark.slow
def test_bf16_on_xla_follows_fp32(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    flags = ["--mixed-precision", "bf16", "--use-syncfree-optim", "--checkpoints-dir", tmp_path]
    succeed(run_xla(*data_flags, *SMALL_RUN, *flags))
    assert training_losses(tmp_path)[-1] == pytest.approx(training_losses(trained)[-1], abs=0.3)


@pytest.mark.slow  # the quick form is in model/test_kernels.py
def test_compile_gives_the_same_losses(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    succeed(run("run_pretrain.py", *data_flags, *SMALL_RUN, "--compile", "--checkpoints-dir", tmp_path))
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained), rel=1e-4)


def test_do_test_prints_the_checkpoints_loss_and_writes_a_line(
    trained: Path, data_flags: list[str], tmp_path: Path
) -> None:
    last = [line["valid_loss"] for line in metrics(trained) if "valid_loss" in line][-1]
    flags = [
        *data_flags,
        "--do-test",
        "--from-checkpoint",
        trained / "step-00000020",
        "--checkpoints-dir",
        tmp_path / "c",
    ]
    text = succeed(run_here("run_pretrain.py", *flags, "--eval-batch-size", 4, "--valid-steps", 3))
    assert f"loss {last:.6f}" in text
    assert f"perplexity {np.exp(last):.4f} on 192 tokens" in text
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["test.jsonl"]
    copy = Path(shutil.copytree(trained / "step-00000020", tmp_path / "run" / "step-00000020"))
    text = succeed(run_here("run_pretrain.py", "--do-test", "--from-checkpoint", copy, "--valid-steps", 1))
    assert text.endswith(f"added to {tmp_path}/run/test.jsonl\n"), "beside the model"


def test_a_time_limit_stops_after_the_step_and_the_run_resumes_without_a_trace(
    trained: Path, data_flags: list[str], tmp_path: Path
) -> None:
    """No copy of the checkpoint stays behind, and no line of the metrics is doubled or lost."""
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path]
    limits = ["--max-minutes", 1e-9, "--max-hours", 1]
    assert "stopped by --max-minutes after step 1;" in succeed(run("run_pretrain.py", *flags, *limits))
    # Resumed runs do not keep a limit. This one is stopped where evaluations are due, and the next makes up for them.
    assert "stopped by --max-hours after step 2;" in succeed(
        run_here("run_pretrain.py", *flags, "--max-hours", 1e-9, "--valid-interval", 2)
    )
    text = succeed(run_here("run_pretrain.py", *flags, "--valid-interval", 2))
    assert "set aside" not in text
    lines, expected = metrics(tmp_path), metrics(trained)
    assert [line["step"] for line in lines if "valid_loss" in line] == list(range(2, 21, 2))
    assert [line["step"] for line in lines if "loss" in line] == [line["step"] for line in expected if "loss" in line]
    assert training_losses(tmp_path) == training_losses(trained)
    steps = ["step-00000001", "step-00000002", "step-00000010", "step-00000020"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()) == steps


def test_a_killed_run_resumes_and_logs_no_step_twice(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", str(tmp_path)]
    slow = [*flags, "--train-steps", "100000", "--decay-steps", "20"]
    process = subprocess.Popen(
        [sys.executable, "run_pretrain.py", *slow], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "step-00000010").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(line["step"] for line in metrics(tmp_path) if "loss" in line)
    succeed(run("run_pretrain.py", *slow, "--train-steps", reached + 20))
    steps = [line["step"] for line in metrics(tmp_path) if "loss" in line]
    assert steps == list(range(1, reached + 21))
    assert training_losses(tmp_path)[:20] == training_losses(trained)


def test_going_back_to_an_older_checkpoint_leaves_the_newer_aside(data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path]
    succeed(run("run_pretrain.py", *flags))
    before = training_losses(tmp_path)
    text = succeed(
        run(
            "run_pretrain.py",
            "--checkpoints-dir",
            tmp_path,
            "--resume",
            tmp_path / "step-00000010",
            "--learning-rate",
            0.02,
        )
    )
    assert "changed: --learning-rate 0.01 -> 0.02" in text
    assert "set aside: step-00000020" in text
    after = training_losses(tmp_path)
    assert after[:11] == before[:11], "the loss of step 11 is still that of the old weights"
    assert after[12:] != before[12:]
    assert len(after) == 20


def test_a_diverged_run_fails_and_spoils_no_checkpoint(data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path]
    succeed(run("run_pretrain.py", *flags, "--train-steps", 10))
    for result in (
        run("run_pretrain.py", *flags, "--learning-rate", 1e30, "--save-interval", 1, "--saved-checkpoint-limit", 1),
        torchrun(2, *flags, "--learning-rate", 1e30),
    ):
        assert result.returncode == 1, result.stderr
        assert told(result, "the run has diverged") == 1, result.stderr
    for folder in run_folder.list_checkpoints(tmp_path):
        _, weights = load_weights(folder)
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_an_error_that_only_one_process_meets_is_told_and_ends_all(tmp_path: Path) -> None:
    """An id that no sample finds, in a window of the second process; the first waits for it in a collective."""
    tokens = np.zeros(2_000_000, dtype=np.uint16)
    tokens[16 * 314 + 5] = 96  # the third of four windows of its micro-step
    write_split(tmp_path / "train", tokens, shards=1)
    write_split(tmp_path / "test", tokens[:200], shards=1)
    flags = [
        "--train-dir",
        tmp_path / "train",
        "--valid-dir",
        tmp_path / "test",
        *SMALL_RUN,
        "--vocab-size",
        90,
        "--train-steps",
        40,
    ]
    result = torchrun(2, *flags, "--checkpoints-dir", tmp_path / "c")
    assert result.returncode != 0
    assert told(result, "000.npy: id 96 does not fit --vocab-size 90") == 1, result.stderr


def test_a_failing_wandb_does_not_disturb_the_run(data_flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(
        "class Run:\n    offline, step = False, 0\n    def log(self, *a, **k): raise RuntimeError('unreachable')\n"
        "class Settings:\n    def __init__(self, **k): pass\n"
        "def init(**k): return Run()\n"
    )
    flags = [
        *data_flags,
        *SMALL_RUN,
        "--wandb-logging",
        "--wandb-logging-interval",
        1,
        "--checkpoints-dir",
        tmp_path / "c",
    ]
    result = run("run_pretrain.py", *flags, PYTHONPATH=str(tmp_path))
    succeed(result)
    assert result.stderr.count("wandb failed (unreachable)") == 1
    assert len(training_losses(tmp_path / "c")) == 20


def test_the_summary_adds_up(data_flags: list[str], tmp_path: Path) -> None:
    text = succeed(run("run_pretrain.py", *data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path, "--train-steps", 2))
    assert "4 sequences x 1 device x 3 micro-steps = 12 sequences = 192 tokens per step" in text
    assert "5,000 tokens to train on, 500 to validate on" in text
    lines = metrics(tmp_path)
    assert [line["tokens"] for line in lines if "loss" in line] == [192, 384]
    needed = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "compiles", "trace_ms"}
    needed |= {"skipped", "time"}
    assert all(line.keys() == needed for line in lines if "loss" in line)


def test_on_a_terminal_there_is_a_progress_bar(data_flags: list[str], tmp_path: Path) -> None:
    terminal, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    result = subprocess.run(
        [sys.executable, "run_pretrain.py", *data_flags, *SMALL_RUN, "--checkpoints-dir", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=slave, text=True, check=True,
    )  # fmt: skip
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        text += part
    os.close(terminal)
    shown = text.decode(errors="replace")
    assert re.search(r"100% \|#{10}\| 20/20, loss \S+, [\d,]+ tokens/s, lr \S+, mfu \S+%", shown)
    assert "\x1b" not in shown
    assert "expected to end in" in result.stdout
    assert re.search(r"step     20: validation loss \d\.\d{4} ± \d\.\d{4}, perplexity", result.stdout)


def test_wandb_offline_gets_every_step_and_the_resumed_run_keeps_its_id(
    data_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[int] = []
    log = wandb.Run.log

    def recorded(run: wandb.Run, values: dict, step: int) -> None:
        logged.extend([step] if "loss" in values else [])
        log(run, values, step=step)

    monkeypatch.setattr(wandb.Run, "log", recorded)
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path, "--wandb-logging", "--wandb-logging-interval", 4]
    flags += ["--wandb-tags", "a, b", "--wandb-name", "test"]
    succeed(run_here("run_pretrain.py", *flags, "--train-steps", 10))
    assert logged == list(range(1, 11))
    succeed(run_here("run_pretrain.py", *flags))
    assert logged == list(range(1, 21))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({folder.name.rsplit("-")[-1] for folder in runs}) == 1
    assert all(list(folder.glob("*.wandb")) for folder in runs)
