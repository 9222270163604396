"""The newest numbers of a log, whatever its length."""

import json
import tracemalloc
from pathlib import Path

import numpy as np

from gpt2xla.checkpoint.logged import newest_line, newest_lines


def write(file: Path, lines: list[dict], end: str = "") -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")


def test_lines_come_newest_first_whatever_their_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [
        {"step": step, "valid_loss" if step % 7 == 0 else "loss": 1.0, "sample": "x" * int(rng.integers(0, 9000))}
        for step in range(1, 200)
    ]
    lines[100]["sample"] = "x" * 300_000
    file = tmp_path / "metrics.jsonl"
    write(file, lines)
    assert [*newest_lines(file, "valid_loss")] == [line for line in lines[::-1] if "valid_loss" in line]
    assert [*newest_lines(file, "sample")] == lines[::-1]
    assert newest_line(file, "valid_loss", 20) == lines[13]


def test_a_line_that_a_crash_cut_short_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}], end='{"step": 3, "loss": 1.')
    assert newest_line(file, "loss") == {"step": 1, "loss": 2.0}


def test_without_a_file_or_without_such_a_line_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert newest_line(file, "loss") is None
    file.touch()
    assert newest_line(file, "loss") is None
    write(file, [{"step": 1, "loss": 2.0}])
    assert newest_line(file, "valid_loss") is None


def test_a_look_at_a_long_log_takes_no_more_memory_than_at_a_short_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, [{"step": step, "loss": 1.0, "rest": "x" * 200} for step in range(20_000)])
    tracemalloc.start()
    assert newest_line(file, "loss") == {"step": 19_999, "loss": 1.0, "rest": "x" * 200}
    assert newest_line(file, "valid_loss") is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < file.stat().st_size
