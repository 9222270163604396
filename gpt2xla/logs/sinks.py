"""Receivers of a run's metrics. `metrics.jsonl` is the truth; the console and Weights & Biases are views of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from gpt2xla.errors import counted
from gpt2xla.files import write_whole
from gpt2xla.logs.console import LINE, say

METRICS_FILE = "metrics.jsonl"
TEST_FILE = "test.jsonl"  # written by --do-test
SKETCHES_FOLDER, TENSORBOARD_FOLDER = "sketches", "tensorboard"  # in the run's folder
# Between lines of a log: at first 10, later a sixtieth of the time so far. A night of training is some 300 lines.
_SECONDS_BETWEEN_LINES, _MOST_SECONDS_BETWEEN_LINES = 10, 300
_NUMBERS_BESIDE_A_BAR = 3


class Sink(Protocol):
    """Receives lines. Every line has "step", counted from 1. Training lines have "loss", validation lines "valid_loss",
    HellaSwag's lines "hellaswag_acc", samples "sample", and lines of sketches "sketch_top1" and perhaps "sketches", the path
    of a PNG in the run's folder."""

    def write(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends lines to a file such as `metrics.jsonl`, one JSON object each, floats in full precision. While the disk is
    full, lines wait in memory.

    A resumed run first drops the lines that a crashed one wrote after its last checkpoint, so that no step appears twice. It
    also drops the evaluations of the checkpoint's step, unless they are complete."""

    def __init__(self, file: Path, resumed_step: int | None = None, is_evaluated: bool = True) -> None:
        if resumed_step is not None and file.exists():
            _truncate_after(file, resumed_step, is_evaluated)
        self._file = file
        self._stream = file.open("ab", buffering=0)
        self._unwritten = b""
        self._is_reported = False

    def write(self, line: dict[str, Any]) -> None:
        # JSON has no NaN and no infinities. They are written as null.
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._unwritten += json.dumps(values).encode() + b"\n"
        self._write_out()

    def close(self) -> None:
        self._write_out()
        self._stream.close()
        if self._unwritten:
            lines = counted(self._unwritten.count(b"\n"), "line")
            say(f"{self._file}: could not write the last {lines}", error=True)

    def _write_out(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]
        except OSError as error:
            if not self._is_reported:
                say(f"{self._file} cannot be written ({error.strerror}); its lines wait in memory", error=True)
            self._is_reported = True


class ConsoleSink:
    """Shows the newest step in the changing line of a terminal; elsewhere, for log files, it prints a line now and then.

    Args:
        pace: returns the speed of the newest steps, `Throughput.pace`; nothing while it is unknown.
        left: returns the expected seconds to the end; None while they are unknown.
        best: the step and the loss of the best validation so far; None for the loss if there was none."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        pace: Callable[[], dict[str, float | None]],
        left: Callable[[], float | None],
        best: tuple[int, float | None] = (0, None),
    ) -> None:
        self._first, self._last, self._pace, self._left, self._best = first_step, last_step, pace, left, best
        self._started = self._last_line = time.monotonic()

    def write(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if "loss" not in line:
            say(f"step {step:>6}: {_evaluation_text(line)}{self._compared(line)}")
            return
        seconds = self._left()
        left = tqdm.format_interval(seconds) if seconds and step < self._last else ""
        numbers = _training_numbers(line | self._pace(), left)
        if LINE.is_possible:
            LINE.show(_training_forms(step, self._last, numbers))
            return
        now = time.monotonic()
        between = min(max(_SECONDS_BETWEEN_LINES, (now - self._started) / 60), _MOST_SECONDS_BETWEEN_LINES)
        if step in (self._first + 1, self._last) or now - self._last_line >= between:
            self._last_line = now
            say(f"step {step:>6}/{self._last}: {', '.join(numbers)}")

    def _compared(self, line: dict[str, Any]) -> str:
        """Return the best validation so far, if this line is one and is not better."""
        (step, lowest), loss = self._best, line.get("valid_loss", math.nan)
        if lowest is not None and loss > lowest:
            return f"; best so far {lowest:.4f} at step {step}"
        if math.isfinite(loss) and loss != lowest:
            self._best = line["step"], loss
        return ""

    def close(self) -> None:
        if text := LINE.clear():
            say(text, error=True)


def with_error(loss: float, standard_error: float | None) -> str:
    """Return "3.2914 ± 0.0031"; only the loss if its standard error is unknown."""
    return f"{loss:.4f}" if standard_error is None else f"{loss:.4f} ± {standard_error:.4f}"


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _training_numbers(line: dict[str, Any], left: str) -> list[str]:
    """Return the numbers of a training step, the most important first."""
    numbers = [f"loss {line['loss']:.4f}", left and f"{left} left", f"{line['tokens_per_second']:,.0f} tokens/s"]
    numbers += [f"lr {line['lr']:.2e}", "" if line["mfu"] is None else f"mfu {line['mfu']:.1%}"]
    return [number for number in numbers if number]


def _training_forms(step: int, last: int, numbers: list[str]) -> Iterator[str]:
    """Yield the line of a training step from the longest form to the shortest: the least important numbers go first, then
    the bar, then the others."""
    bar = tqdm.format_meter(step, last, 0, ascii=True, bar_format="{percentage:3.0f}% |{bar:10}| ")
    texts = [", ".join([f"{step}/{last}", *numbers[:count]]) for count in range(len(numbers), -1, -1)]
    yield from (bar + text for text in texts[:-_NUMBERS_BESIDE_A_BAR])
    yield from texts


def _evaluation_text(line: dict[str, Any]) -> str:
    if "valid_loss" in line:
        loss, error = line["valid_loss"], line["valid_standard_error"]
        ppl = perplexity(loss)
        shown = f"{with_error(loss, error)}, perplexity {ppl:.{0 if ppl >= 1000 else 2}f}"
        return f"validation loss {shown} on {counted(line['valid_tokens'], 'token')}"
    if "hellaswag_acc" in line:
        acc, acc_norm, items = (line[f"hellaswag_{name}"] for name in ("acc", "acc_norm", "items"))
        return f"HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f} of {counted(items, 'item')}"
    if "sample" in line:
        return f"sample: {line['sample']}"
    if "sketch_top1" in line:
        drawn = f"; drawn in {line['sketches']}" if "sketches" in line else ""
        top1, top5, drawings = (line[f"sketch_{name}"] for name in ("top1", "top5", "drawings"))
        return f"sketches: top-1 {top1:.4f}, top-5 {top5:.4f} of {counted(drawings, 'held-out drawing')}{drawn}"
    return ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("step", "tokens"))


def _truncate_after(file: Path, step: int, is_evaluated: bool) -> None:
    kept = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            if line["step"] < step or (line["step"] == step and (is_evaluated or "loss" in line)):
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short
    write_whole(file, "".join(kept))
