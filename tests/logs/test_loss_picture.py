"""The picture of losses: what it says, and what it is drawn from."""

import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from gpt2xla.commands.plot_loss import plot
from gpt2xla.config import RunConfig
from gpt2xla.errors import InputError
from gpt2xla.logs.loss_picture import draw, short
from gpt2xla.logs.run_curves import names_of, read_curves


def write_run(folder: Path, losses: list[float | None], first_step: int = 1) -> Path:
    """A run of 100 tokens a step, validated after the last one."""
    folder.mkdir(parents=True)
    steps = list(enumerate(losses, first_step))
    lines = [{"step": s, "tokens": 100 * s, "loss": loss, "lr": 1e-3 / s, "grad_norm": 1 + 1 / s} for s, loss in steps]
    lines += [{"step": steps[-1][0], "tokens": 100 * steps[-1][0], "valid_loss": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def texts_of(*runs: Path, **options: bool) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        svg = draw([read_curves(run) for run in runs], "svg", **options).decode()
    return "\n".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_a_run_becomes_each_kind_of_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "some run", [5.0 - n / 10 for n in range(20)])
    (run / "run_config.json").write_text(json.dumps(RunConfig.from_flat({"vocab_size": 50257}).to_flat()))
    for name, magic in (("loss.png", b"\x89PNG"), ("loss.svg", b"<?xml"), ("loss.PDF", b"%PDF")):
        plot([run, run / "metrics.jsonl"], tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
    texts = texts_of(run, more=True)
    assert "some run\n124M parameters, 20 steps, 2K tokens" in texts
    assert read_curves(run).parameters == 124_439_808, "as OpenAI's GPT-2 has"
    assert {"tokens (100 per step)", "learning rate", "gradient norm", "2.500"} <= set(texts.splitlines())
    assert "Loss of" not in texts, "the same run twice is one run"


def test_runs_of_one_name_are_told_apart_and_each_last_validation_is_written(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / part / "$a_b$" / "checkpoints", [5.0, 4.0, 3.0]) for part in ("x", "_y")]
    texts = texts_of(*runs).splitlines()
    assert "Loss of 2 runs" in texts
    assert [t for t in texts if "checkpoints" in t] == [f" {p}/$a_b$/checkpoints (300 tokens)" for p in ("x", "_y")]
    assert texts.count("2.500") == 2
    assert names_of([Path("a/c.jsonl"), Path("b/metrics.jsonl"), Path("d/c.jsonl")]) == ["a/c", "b", "d/c"]


def test_smoothing_is_a_mean_that_crosses_no_gap_and_keeps_the_beginning(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = [float(loss) for loss in rng.normal(3, 1, 1000)]
    run = read_curves(
        write_run(tmp_path / "a", [None if n in (400, 401, 700) else loss for n, loss in enumerate(losses)])
    )
    assert run.half_window == 10
    expected = []
    for n in range(1000):
        half = min(10, (n + 1) // 4)
        start, end = next((a, b) for a, b in ((0, 400), (400, 402), (402, 700), (700, 701), (701, 1000)) if n < b)
        is_lost = (start, end) in ((400, 402), (700, 701))
        expected.append(math.nan if is_lost else np.mean(losses[max(start, n - half) : min(end, n + half + 1)]))
    np.testing.assert_allclose(run.smoothed(run.loss), expected, rtol=1e-9)
    assert run.skipped.tolist() == [40100, 40200, 70100]
    assert "mean of the 21 steps" in texts_of(tmp_path / "a")
    assert "x: not a number, skipped." in texts_of(tmp_path / "a")


def test_a_run_that_is_writing_or_has_one_step_or_none(tmp_path: Path) -> None:
    going = write_run(tmp_path / "going", [5.0])
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tok')
    assert "1 step, 100 tokens" in texts_of(going, more=True)
    assert texts_of(going, log_x=True)
    (going / "metrics.jsonl").write_text('{"step": 1\n{"step": 2, "tokens": 200, "loss": 1}\n')
    with pytest.raises(InputError, match="line 1: it does not hold the metrics of a run"):
        read_curves(going)
    (going / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no training step yet"):
        read_curves(going)


def test_many_steps_make_a_small_picture(tmp_path: Path) -> None:
    run = read_curves(write_run(tmp_path / "long", [3 + 1 / (n + 1) for n in range(20_000)]))
    assert len(draw([run], "svg")) < 400_000


def test_numbers_in_three_digits() -> None:
    assert [short(n) for n in (0, 999, 1000, 8192, 124_439_808, 999_950, 1.56e9)] == [
        "0", "999", "1K", "8.19K", "124M", "1M", "1.56B",
    ]  # fmt: skip
