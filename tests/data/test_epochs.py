"""--epochs is the fewest updates that read so many windows: by a count, and as a run keeps it."""

import itertools
import json
from pathlib import Path

import pytest
from conftest import SMALL_RUN, learnable_tokens, metrics, run_here, succeed, write_split

from gpt2xla.checkpoint.start import Start, find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig
from gpt2xla.errors import InputError

SIZES = ["--seq-length", "16", "--vocab-size", "97", "--d-model", "32", "--num-layers", "1", "--num-heads", "2"]


def start(*flags: object) -> Start:
    return find_start(parse_run(TorchConfig, [*SIZES, *map(str, flags)])[0])


def steps_of(*flags: object) -> int:
    return start(*flags).config.train.train_steps


def counted(windows: int, numerator: int, denominator: int, sequences: int) -> int:
    """Count updates until they have read numerator / denominator times all windows."""
    return next(step for step in itertools.count() if step * sequences * denominator >= numerator * windows)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two data sets: 30 and 7 windows of 16 tokens."""
    for name, windows in (("a", 30), ("b", 7)):
        write_split(tmp_path / name, learnable_tokens(windows * 16 + 5, seed=windows), shards=2)
    return [tmp_path / "a", tmp_path / "b"]


def test_steps_equal_a_count(folders: list[Path], tmp_path: Path) -> None:
    new = ["--checkpoints-dir", tmp_path / "new", "--valid-dir", folders[1], "--warmup-steps", 0]
    for text, ratio in {"1": (1, 1), "0.1": (1, 10), "2.5": (5, 2), "7": (7, 1), "1e-3": (1, 1000)}.items():
        for batch, accum in ((1, 1), (3, 2), (8, 3), (64, 1)):
            sizes = ["--train-batch-size", batch, "--gradient-accum-step", accum, "--epochs", text]
            assert steps_of(*new, *sizes, "--train-dir", folders[0]) == counted(30, *ratio, batch * accum)
            mixture = [f"{folders[0]}=0.9", f"{folders[1]}=0.1"]
            assert steps_of(*new, *sizes, "--train-dir", *mixture) == counted(37, *ratio, batch * accum)
            if batch <= 8:
                dropped = steps_of(*new, *sizes, "--train-dir", folders[0], "--drop-last")
                assert dropped == counted(30 // batch * batch, *ratio, batch * accum)


def test_steps_equal_a_count_where_the_batch_changes(folders: list[Path], tmp_path: Path) -> None:
    new = ["--checkpoints-dir", tmp_path / "new", "--valid-dir", folders[1], "--train-dir", folders[0]]
    for epochs in range(1, 6):
        read = itertools.accumulate(itertools.chain([2] * 4, [6] * 5, itertools.repeat(16)))
        expected = next(step for step, sequences in enumerate(read, 1) if sequences >= 30 * epochs)
        assert steps_of(*new, "--epochs", epochs, "--batch-ramp", "2:0", "6:4", "16:9") == expected


def test_a_run_in_epochs_keeps_them_and_its_schedule_follows(folders: list[Path], tmp_path: Path) -> None:
    run = [*SMALL_RUN, "--train-dir", folders[0], "--valid-dir", folders[1], "--checkpoints-dir", tmp_path / "run"]
    for flag in ("--train-steps", "--decay-steps", "--warmup-steps"):
        at = run.index(flag)
        del run[at : at + 2]
    shares = ["--epochs", 3, "--warmup-steps", "25%", "--decay-steps", "50%"]
    printed = succeed(run_here("run_pretrain.py", *run, *shares))
    assert "run: steps 1 to 8: 1,536 tokens in all, 3.20 epochs" in printed
    saved = json.loads((tmp_path / "run" / "run_config.json").read_text())
    assert [saved[name] for name in ("epochs", "train_steps", "warmup_steps", "decay_steps")] == [3.0, 8, 2, 4]
    assert [line["lr"] for line in metrics(tmp_path / "run") if "lr" in line][-4:] == [0.001] * 4
    here = ["--checkpoints-dir", tmp_path / "run"]
    resumed = find_start(parse_run(TorchConfig, [*map(str, here), "--epochs", "5", "--warmup-steps", "10%"])[0])
    assert (resumed.config.train.train_steps, resumed.config.schedule.warmup_steps) == (13, 1)
    resumed = find_start(parse_run(TorchConfig, [*map(str, here), "--train-steps", "9"])[0])
    assert (resumed.config.train.train_steps, resumed.config.train.epochs) == (9, None)
    larger = ["--epochs", "5", "--gradient-accum-step", "6"]  # 8 updates of 12 sequences, then 3 of 24 for 150
    resumed = find_start(parse_run(TorchConfig, [*map(str, here), *larger])[0])
    assert resumed.config.train.train_steps == 11
    assert find_start(parse_run(TorchConfig, [*map(str, here)])[0]).is_finished


def test_epochs_are_refused_beside_steps_and_override_those_of_a_file(folders: list[Path], tmp_path: Path) -> None:
    data = ["--train-dir", folders[0], "--valid-dir", folders[1], "--checkpoints-dir", tmp_path / "new"]
    with pytest.raises(InputError, match="--train-steps and --epochs both set the run's length; leave one out"):
        start(*data, "--epochs", 1, "--train-steps", 5)
    for text in ("0", "-1", "nan", "inf", "1e300"):
        with pytest.raises(InputError, match=r"--epochs .*: choose a number above 0"):
            start(*data, f"--epochs={text}")
    with pytest.raises(InputError, match=r"--train-dir .*: no such folder"):
        start(*data, "--epochs", 1, "--train-dir", tmp_path / "none")
    file = tmp_path / "run.yaml"
    file.write_text("train_steps: 5\n")
    assert steps_of(*data, "--config", file, "--epochs", 8.6, "--train-batch-size", 1) == 33
    file.write_text(json.dumps(start(*data, "--epochs", 2).config.to_flat()))
    again = start("--config", file)
    assert (again.config.train.epochs, again.config.train.train_steps) == (2.0, 1)
