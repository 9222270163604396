"""Receivers of a run's metrics. `metrics.jsonl` is the truth; the console and Weights & Biases are views of it."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from gpt2xla.files import write_whole
from gpt2xla.logs.console import say

METRICS_FILE = "metrics.jsonl"
TEST_FILE = "test.jsonl"  # written by --do-test
_SECONDS_BETWEEN_LINES = 10


class Sink(Protocol):
    """Receives lines. Every line has "step", counted from 1. Training lines have "loss", validation lines "valid_loss",
    HellaSwag's lines "hellaswag_acc", and samples "sample"."""

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
            lines = self._unwritten.count(b"\n")
            say(f"{self._file}: the last {lines} lines could not be written", error=True)

    def _write_out(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]
        except OSError as error:
            if not self._is_reported:
                say(f"{self._file} cannot be written ({error.strerror}); its lines wait in memory", error=True)
            self._is_reported = True


class ConsoleSink:
    """Shows a progress bar on a terminal; elsewhere, for log files, it prints a line now and then."""

    def __init__(self, first_step: int, last_step: int) -> None:
        self._first, self._last = first_step, last_step
        self._last_line = time.monotonic()
        self._first_done: float | None = None
        self._bar = tqdm(
            total=last_step, initial=first_step, desc="training", unit="step", dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def write(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if "loss" not in line:
            say(f"step {step:>6}: {_evaluation_text(line)}")
            return
        mfu = "" if line["mfu"] is None else f", mfu {line['mfu']:.1%}"
        text = f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, {line['tokens_per_second']:,.0f} tokens/s{mfu}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        self._first_done = self._first_done or now  # the first step compiles, so it says nothing about the others
        is_due = step in (self._first + 1, self._last) or now - self._last_line >= _SECONDS_BETWEEN_LINES
        if self._bar.disable and is_due:
            self._last_line = now
            if done := step - self._first - 1:
                seconds = (now - self._first_done) / done * (self._last - step)
                text += f", {tqdm.format_interval(seconds)} left"
            say(f"step {step:>6}/{self._last}: {text}")

    def close(self) -> None:
        self._bar.close()


class Throughput:
    """Measures tokens per second and model FLOPs utilisation (MFU) of each step, from the times at which steps finish.

    MFU is the share of the devices' peak rate that the model's own arithmetic uses (`GPT2.flops_per_token`)."""

    def __init__(self, tokens_per_step: int, flops_per_token: int, peak_flops: float | None) -> None:
        self.tokens_per_step, self._flops, self._peak = tokens_per_step, flops_per_token, peak_flops
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last step, which went into validating or saving."""
        self._last = time.perf_counter()

    def step(self) -> dict[str, float | None]:
        now = time.perf_counter()
        rate = self.tokens_per_step / max(now - self._last, 1e-9)
        self._last = now
        return {"tokens_per_second": rate, "mfu": self._flops * rate / self._peak if self._peak else None}


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _evaluation_text(line: dict[str, Any]) -> str:
    if "valid_loss" in line:
        loss = line["valid_loss"]
        return f"validation loss {loss:.4f}, perplexity {perplexity(loss):.2f} on {line['valid_tokens']:,} tokens"
    if "hellaswag_acc" in line:
        acc, acc_norm, items = (line[f"hellaswag_{name}"] for name in ("acc", "acc_norm", "items"))
        return f"HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f} of {items:,} items"
    if "sample" in line:
        return f"sample: {line['sample']}"
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
