"""The line that a terminal shows of a step, the lines of a log, and the expected end."""

import datetime
import io
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_split

from gpt2xla.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from gpt2xla.data.batch_plan import BatchPlan, Phase
from gpt2xla.data.opening import TrainingData
from gpt2xla.logs import console, sinks, throughput
from gpt2xla.logs.console import say
from gpt2xla.logs.progress import Progress
from gpt2xla.logs.sinks import ConsoleSink
from gpt2xla.logs.throughput import Throughput
from gpt2xla.training.summary import remarks
from gpt2xla.training.time_left import TimeLeft, in_words

STEP = {"step": 12345, "loss": 3.29144, "lr": 6e-4, "tokens_per_second": 94_234.5, "mfu": 0.3123}
EVERYTHING = "12345/20000, loss 3.2914, 2:39:10 left, 94,234 tokens/s, lr 6.00e-04, mfu 31.2%"
BAR = " 62% |######1   | "


def shown(text: str) -> list[str]:
    """What a notebook or a terminal has on its lines in the end, with a carriage return and no other control."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip())
    return lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_TEXTS", 0)
    return stream


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (200, BAR + EVERYTHING),
        (100, BAR + EVERYTHING),
        (80, BAR + "12345/20000, loss 3.2914, 2:39:10 left, 94,234 tokens/s"),
        (60, "12345/20000, loss 3.2914, 2:39:10 left, 94,234 tokens/s"),
        (40, "12345/20000, loss 3.2914, 2:39:10 left"),
        (20, "12345/20000"),
        (11, ""),
    ],
)
def test_the_line_fits_the_terminal_and_cuts_no_number(width: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(console, "columns", lambda: width)
    sink = ConsoleSink(0, 20_000, dict, lambda: 9550.0)
    sink.write(STEP | {"valid": 1})
    assert shown(terminal.getvalue()) == [text]
    sink.close()
    assert shown(terminal.getvalue()) == ([text, ""] if text else [""]), "the last one stays"


def test_other_lines_leave_no_trails_and_no_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr("gpt2xla.logs.progress._SECONDS_BETWEEN_REFRESHES", 0.01)
    sink = ConsoleSink(0, 20_000, dict, lambda: None)
    say("compiling")
    for step in (1, 2):
        sink.write(STEP | {"step": step})
        with Progress("validation", 40, shown=True):
            time.sleep(0.1)
        sink.write({"step": step, "valid_loss": 3.29144, "valid_standard_error": 0.00312, "valid_tokens": 1})
    sink.close()
    end = "3.2914 ± 0.0031, perplexity 26.88 on 1 token"
    evaluations = [f"step {step:>6}: validation loss {end}" for step in (1, 2)]
    last = "  0% |          | 2/20000, loss 3.2914, 94,234 tokens/s, lr 6.00e-04, mfu 31.2%"
    assert shown(terminal.getvalue()) == ["compiling", *evaluations, last, ""]
    assert "validation: 0/40 batches after 00:00" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


def test_a_log_gets_lines_that_grow_rarer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now)
    sink = ConsoleSink(0, 9 * 3600, dict, lambda: 61.0)
    for step in range(1, 9 * 3600 + 1):  # nine hours
        now = float(step)
        sink.write(STEP | {"step": step})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step      1/32400: loss 3.2914, 01:01 left, 94,234 tokens/s, lr 6.00e-04, mfu 31.2%"
    steps = [int(re.search(r"\d+", line)[0]) for line in lines]  # type: ignore[index]
    assert steps[1:4] == [11, 21, 31]
    assert 250 < len(lines) < 350
    assert 250 <= steps[-2] - steps[-3] <= 300


class Clock:
    """The clock of a run, which a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)

    def measure(self, measured: Throughput, tokens: int, seconds: float) -> dict[str, float | None]:
        self.now += seconds
        return measured.step(tokens)


def test_the_expected_end_counts_evaluations_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = Clock(monkeypatch), datetime.datetime(2026, 11, 27, 14, 0)

    def begin(first: int, last: int, intervals: dict[str, int], validation: float) -> tuple[TimeLeft, Throughput]:
        measured = Throughput(1, None)
        return TimeLeft(first, last, lambda step: 10 * step, measured, intervals, validation), measured

    said = []
    for limit, pace in ((1e9, 6.0), (600.0, 6.0), (1e9, 40.0)):
        left, measured = begin(1000, 2000, {"valid_loss": 100, "sample": 0}, validation=50)
        for step in range(1001, 1031):
            clock.measure(measured, 10, 500.0 if step == 1001 else pace)  # the first one compiles
            left.step(step)
            said.append((step, left.expected_end(limit, now)))
    left, measured = begin(1000, 2000, {"valid_loss": 100, "sample": 0}, validation=50)
    for step in range(1001, 1031):
        clock.measure(measured, 10, 500.0 if step == 1001 else 6.0)
        left.step(step)
    assert left.seconds() == pytest.approx(970 * 6 + 10 * 5 * 6)
    # 989 steps of 6 s, and 10 validations of 5 steps each.
    assert [(step, text) for step, text in said if text] == [
        (1011, "expected to end in 1 h 44 min, at 15:43 (6 s per step)"),
        (1011, "expected to stop at the time limit in 10 min, at 14:10, after about step 1106 of 2000 (6 s per step)"),
        (1003, "expected to end in 11 h 38 min, at Sat 28 Nov, 01:38 (40 s per step)"),
    ]
    left.evaluation("valid_loss", 60.0)
    left.evaluation("sample", 7.0)
    assert left.seconds() == pytest.approx(970 * 6 + 10 * 60 + 7)
    short, measured = begin(0, 19, {}, 0)
    for step in range(1, 19):
        clock.measure(measured, 10, 1.0)
        short.step(step)
        assert not short.expected_end(1e9, now)
    assert short.seconds() == pytest.approx(1)


def test_the_numbers_of_a_line_agree_with_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of uneven sizes and times, of which some arrive together. By the speed shown, the tokens that are left take the
    time shown, and MFU is that speed's. All three are those of the newest 100 steps: their tokens over their seconds."""
    clock, draw = Clock(monkeypatch), np.random.default_rng(0)
    monkeypatch.setattr(sinks, "_SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(sinks.time, "monotonic", lambda: 0.0)
    sizes = draw.choice([8192, 16_384, 65_536], 400)
    read = np.concatenate([[0], np.cumsum(sizes)])
    seconds = [30.0, *np.where(draw.random(399) < 0.3, 1e-5, draw.gamma(4, 0.2, 399))]
    measured = Throughput(flops_per_token := 855_166_464, peak := 100e12)
    left = TimeLeft(0, 400, lambda step: int(read[step]), measured, {}, 0)
    sink = ConsoleSink(0, 400, measured.pace, left.seconds)
    expected_ends = []
    for step in range(1, 401):
        line = STEP | {"step": step} | clock.measure(measured, int(sizes[step - 1]), seconds[step - 1])
        left.step(step)
        sink.write(line)
        expected_ends.append(left.expected_end(1e9, datetime.datetime(2026, 11, 27, 14, 0)))
        if step == 1:
            assert measured.pace() == {}
            continue
        newest = slice(max(1, step - 100), step)  # from the second on
        rate = sizes[newest].sum() / sum(seconds[newest])
        assert measured.pace() == pytest.approx({"tokens_per_second": rate, "mfu": flops_per_token * rate / peak})
        assert left.seconds() == pytest.approx((read[400] - read[step]) / rate)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 400
    for step, text in enumerate(lines[1:-1], 2):
        minutes, rest, speed, percent = re.search(
            r", ([\d:]+):(\d\d) left, ([\d,]+) tokens/s.*mfu ([\d.]+)%", text
        ).groups()  # type: ignore[union-attr]
        shown_left, shown = 60 * int(minutes) + int(rest), int(speed.replace(",", ""))
        assert shown_left == pytest.approx((read[400] - read[step]) / shown, abs=1)
        assert float(percent) == pytest.approx(100 * flops_per_token * shown / peak, abs=0.06)
    (said,) = [(step, text) for step, text in enumerate(expected_ends, 1) if text]
    rate = sizes[1 : said[0]].sum() / sum(seconds[1 : said[0]])
    assert in_words((read[400] - read[said[0]]) / rate) in said[1]


def test_the_expected_end_counts_the_tokens_of_updates_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 s per sequence of 10 tokens: after step 10, 90 updates of one and 100 of three sequences are left."""
    clock, plan = Clock(monkeypatch), BatchPlan((Phase(0, 1, 1), Phase(100, 1, 3)))
    measured = Throughput(1, None)
    left = TimeLeft(0, 200, lambda step: 10 * plan.sequences_before(step), measured, {}, 0)

    def do(first: int, last: int) -> None:
        for step in range(first, last + 1):
            sequences, is_first = plan.at(step - 1).sequences, step in (1, 101)
            clock.now += 99 if is_first else 2 * sequences  # it compiles
            measured.step(10 * sequences, is_first=is_first)
            left.step(step)

    do(1, 10)
    assert left.seconds() == pytest.approx((90 + 300) * 2)
    do(11, 11)
    said = left.expected_end((89 + 80 * 3 + 2) * 2, datetime.datetime(2026, 11, 27, 14, 0))
    assert "after about step 180 of 200" in said
    do(12, 102)
    assert left.seconds() == pytest.approx(98 * 6)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.6, "5 s"), (59.7, "1 min"), (9540, "2 h 39 min"), (7200, "2 h 0 min"), (97_200, "1 d 3 h")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(("steps", "said"), [(8, 1), (9, 2)])
def test_a_run_notes_few_tokens_and_many_epochs(steps: int, said: int, tmp_path: Path) -> None:
    for split, tokens in (("train", 129), ("test", 100)):  # 8 windows of 16 tokens, of which a step reads 4
        write_split(tmp_path / split, np.arange(tokens) % 97)
    config = RunConfig(
        data=DataConfig(train_dir=(str(tmp_path / "train"),), valid_dir=str(tmp_path / "test")),
        model=ModelConfig(vocab_size=97, seq_length=16, d_model=32, num_layers=1, num_heads=2),
        train=TrainConfig(train_batch_size=4, gradient_accum_step=1, train_steps=steps),
    )
    notes = list(remarks(config.train, TrainingData.open(config, BatchPlan.of(config.train, 1), None, 0, 1)))
    assert notes[0].startswith(
        "note: the validation split has only 100 tokens, so validation losses will be noisy, by "
    )
    assert len(notes) == said
    if said > 1:
        assert f"reads {tmp_path / 'train'} (129 tokens) 4.5 times" in notes[1]
