"""TensorBoard, read with its own reader, shows the lines of metrics.jsonl: each once, also after kills and resumes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, metrics, run_here, succeed, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2xla.logs.sinks import METRICS_FILE, TENSORBOARD_FOLDER, JsonlSink
from gpt2xla.logs.sketch_picture import sketch_picture
from gpt2xla.logs.tensorboard_sink import TensorBoardSink

# What its users know these numbers as, independent of the code.
TAGS = {
    "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "tokens": "train/tokens", "mfu": "train/mfu",
    "tokens_per_second": "train/tokens_per_second", "valid_loss": "valid/loss", "hellaswag_acc": "hellaswag/acc",
    "valid_bits_per_byte": "valid/bits_per_byte", "sketch_top1": "sketches/top1", "sketch_top5": "sketches/top5",
}  # fmt: skip


def shown(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / TENSORBOARD_FOLDER), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = shown(folder)
    return [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def is_view_of_metrics(folder: Path) -> None:
    """Every number of metrics.jsonl is shown once, in fp32, and nothing else is."""
    lines = metrics(folder)
    for key, tag in TAGS.items():
        of_lines = [x for x in lines if x.get(key) is not None and (key != "tokens" or "loss" in x)]
        assert points(folder, tag) == [(x["step"], pytest.approx(x[key], rel=1e-6)) for x in of_lines], tag
    texts = shown(folder).Tensors("sample") if any("sample" in line for line in lines) else []
    found = [(t.step, t.tensor_proto.string_val[0].decode().replace("    ", "").strip()) for t in texts]
    assert found == [(x["step"], x["sample"].strip()) for x in lines if "sample" in x]


def trained(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "loss": 5.0 - step / 100, "mfu": None, "time": 1e9 + step}


LINES = [
    trained(1),
    {"step": 1, "tokens": 10, "sample": "Once\n\nupon"},
    trained(2) | {"loss": float("nan")},
    trained(3),
]
LINES += [{"step": 3, "tokens": 30, "valid_loss": 4.5, "valid_bits_per_byte": 1.5}]
LINES += [{"step": 3, "tokens": 30, "hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.5}]
LINES += [{"step": 3, "tokens": 30, "sketch_top1": 0.25, "sketch_top5": 0.5, "sketch_drawings": 8, "sketches": "a.png"}]
LINES += [
    {"step": 4, "tokens": 40, "sketch_top1": 0.5, "sketch_top5": 1.0, "sketch_drawings": 8, "sketches": "gone.png"}
]


def write(folder: Path, resumed_step: int | None, *lines: dict[str, Any]) -> None:
    sinks = [JsonlSink(folder / METRICS_FILE, resumed_step), TensorBoardSink(folder)]
    for line, sink in itertools.product(lines, sinks):
        sink.write(line)
    for sink in sinks:
        sink.close()


def test_every_kind_of_line_is_shown(tmp_path: Path) -> None:
    png = sketch_picture([np.eye(24, dtype=bool)], ["line"])
    (tmp_path / "a.png").write_bytes(png)
    write(tmp_path, None, *LINES)
    is_view_of_metrics(tmp_path)
    (drawn,) = shown(tmp_path).Images("sketches/drawn")
    assert (drawn.step, drawn.encoded_image_string, drawn.width, drawn.height) == (3, png, 144, 166)
    assert [e.wall_time for e in shown(tmp_path).Scalars("train/loss")] == [1e9 + 1, 1e9 + 3]
    assert [e.wall_time for e in shown(tmp_path).Scalars("valid/loss")] == [1e9 + 3], "of the newest step"


def test_a_resumed_run_goes_back_and_an_older_log_is_taken_along(tmp_path: Path) -> None:
    """A run resumed at step 2, twice; the first part was logged without TensorBoard. What a crash cut short goes, too."""
    before = JsonlSink(tmp_path / METRICS_FILE)
    for line in map(trained, range(1, 4)):
        before.write(line)
    before.close()
    write(tmp_path, 2, *map(trained, range(3, 6)))
    is_view_of_metrics(tmp_path)
    (file,) = (tmp_path / TENSORBOARD_FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    for _ in range(3):
        write(tmp_path, 2, trained(3) | {"loss": 1.0}, trained(4))
        is_view_of_metrics(tmp_path)
    assert len(list((tmp_path / TENSORBOARD_FOLDER).iterdir())) == 2
    assert points(tmp_path, "train/loss")[2:] == [(3, 1.0), (4, pytest.approx(4.96))]


def test_a_tensorboard_that_is_open_forgets_what_the_resumed_run_repeats(tmp_path: Path) -> None:
    write(tmp_path, None, *map(trained, range(1, 6)))
    watching = shown(tmp_path)
    assert len(watching.Scalars("train/loss")) == 5
    write(tmp_path, 3, trained(4), trained(5), trained(6))
    watching.Reload()
    assert [e.step for e in watching.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / TENSORBOARD_FOLDER).write_text("a file of that name")
    write(tmp_path, None, *LINES)
    assert capsys.readouterr().err.count("TensorBoard failed") == 1
    assert len(metrics(tmp_path)) == len(LINES)


def test_a_missing_package_is_one_line_before_anything_is_written(
    data_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else find(name))
    flags = [*data_flags, *SMALL_RUN, "--tensorboard-logging", "--checkpoints-dir", tmp_path / "c"]
    result = run_here("run_pretrain.py", *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "--tensorboard-logging" in line
    assert "pip install 'gpt2xla[tensorboard]'" in line
    assert not (tmp_path / "c").exists()


@pytest.fixture
def killed(data_flags: list[str], tmp_path: Path) -> tuple[Path, list[str]]:
    """A run that was killed some steps after its second checkpoint, and its flags."""
    folder = tmp_path / "killed"
    flags = [*data_flags, *SMALL_RUN, "--no-compile", "--train-steps", "1000000", "--checkpoints-dir", str(folder)]
    flags += ["--tensorboard-logging", "--valid-interval", "5", "--save-interval", "20", "--decay-steps", "100"]
    process = subprocess.Popen([sys.executable, "run_pretrain.py", *flags], cwd=ROOT, stdout=-3, env=os.environ)
    wait_for(lambda: (folder / "step-00000040").exists() and metrics(folder)[-1]["step"] > 43, 200)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return folder, flags


def test_a_killed_and_resumed_run_shows_each_step_once(killed: tuple[Path, list[str]]) -> None:
    folder, flags = killed
    steps = sorted(int(f.name[5:]) for f in folder.glob("step-*"))
    end = steps[-1] + 12
    succeed(run_here("run_pretrain.py", *flags, "--train-steps", end))
    assert [step for step, _ in points(folder, "train/loss")] == list(range(1, end + 1))
    is_view_of_metrics(folder)
    assert json.loads((folder / "run_config.json").read_text())["tensorboard_logging"] is True
