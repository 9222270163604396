"""The curves of a run, read from its metrics.jsonl: what a picture of its losses shows."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError
from gpt2xla.files import read_json
from gpt2xla.logs.sinks import METRICS_FILE


@dataclass(frozen=True)
class Curves:
    """One run. The arrays of training have an entry for each step that was logged, NaN where a value is not a number."""

    file: Path
    steps: np.ndarray
    tokens: np.ndarray  # read up to and with this step
    loss: np.ndarray
    lr: np.ndarray
    grad_norm: np.ndarray
    valid_tokens: np.ndarray
    valid_loss: np.ndarray
    parameters: int | None  # None if there is no run_config.json beside the file that says so

    @property
    def half_window(self) -> int:
        """How many steps before and after a step `smoothed` takes in: 1% of the run, but two in a short one."""
        return max(len(self.steps) // 100, min(2, len(self.steps) // 10))

    @property
    def skipped(self) -> np.ndarray:
        """The tokens of the steps whose loss or gradient was not a number."""
        return self.tokens[np.isnan(self.loss) | np.isnan(self.grad_norm)]

    def smoothed(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of each value and those of the `half_window` steps before and after it.

        It never reaches over a step that is missing or not a number. In the steep beginning it is narrower: step n takes in
        n / 4 steps on each side. The last means lack the steps that are still to come."""
        means = np.full(len(values), np.nan)
        for start, end in self._stretches(values):
            part, i = values[start:end], np.arange(end - start)
            most = np.minimum(self.half_window, self.steps[start:end].astype(int) // 4)
            before, after = np.minimum(most, i), np.minimum(most, len(part) - 1 - i)
            sums = np.concatenate([[0.0], part.cumsum()])
            means[start:end] = (sums[i + after + 1] - sums[i - before]) / (before + after + 1)
        return means

    def _stretches(self, values: np.ndarray) -> list[tuple[int, int]]:
        """Return (start, end) of each stretch of steps that follow one another and have a value."""
        known = np.isfinite(values)
        follows = known[1:] & known[:-1] & (np.diff(self.steps) == 1)
        starts = np.flatnonzero(known & ~np.concatenate([[False], follows]))
        ends = np.flatnonzero(known & ~np.concatenate([follows, [False]])) + 1
        return list(zip(starts.tolist(), ends.tolist(), strict=True))


def read_curves(run: Path) -> Curves:
    """Read a run's folder, or its metrics.jsonl, also while it is training. Raises InputError."""
    file = run / METRICS_FILE if run.is_dir() else run
    try:
        texts = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; name a folder that a run wrote to") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} does not hold the metrics of a run") from None
    training, validation = [], []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if "loss" in line:
                training.append([_number(line.get(key)) for key in ("step", "tokens", "loss", "lr", "grad_norm")])
            elif line.get("valid_loss") is not None:
                validation.append([_number(line["tokens"]), _number(line["valid_loss"])])
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(texts) and not text.endswith("\n"):
                break  # it is being written
            raise InputError(f"{file}, line {number}: it does not hold the metrics of a run") from None
    if not training:
        raise InputError(f"{file} holds no training step yet; draw it after the first one")
    steps, tokens, loss, lr, grad_norm = np.array(training).T
    valid_tokens, valid_loss = np.array(validation).reshape(-1, 2).T
    return Curves(file, steps, tokens, loss, lr, grad_norm, valid_tokens, valid_loss, _parameters(file.parent))


def names_of(files: Sequence[Path]) -> list[str]:
    """Return a name for each metrics file: its folder's name, with as many parents as tell it from the others."""
    paths = [Path(os.path.abspath(f)) for f in files]
    paths = [path.parent if path.name == METRICS_FILE else path.with_suffix("") for path in paths]
    depths = [1] * len(paths)
    while True:
        names = [os.path.join(*path.parts[-depth:]) for path, depth in zip(paths, depths, strict=True)]
        counts = Counter(names)
        longer = [min(d + (counts[n] > 1), len(p.parts)) for n, d, p in zip(names, depths, paths, strict=True)]
        if longer == depths:
            return names
        depths = longer


def thinned(x: np.ndarray, y: np.ndarray, log_x: bool = False, columns: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that can be seen in a picture of so many columns: of each column the first, last, lowest and
    highest, and a gap."""
    if len(x) <= 4 * columns:
        return x, y
    place = np.log(np.maximum(x, 1)) if log_x else x
    column = ((place - place.min()) / max(np.ptp(place), 1e-9) * columns).astype(int)
    kept: list[int] = []
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(column)) + 1):
        gaps = np.isnan(y[part])
        chosen = {part[0], part[-1]} | ({part[gaps.argmax()]} if gaps.any() else set())
        if not gaps.all():
            chosen |= {part[np.nanargmin(y[part])], part[np.nanargmax(y[part])]}
        kept += sorted(chosen)
    return x[kept], y[kept]


def short(number: float) -> str:
    """Return a number in three digits: 124M."""
    for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if abs(number) >= 0.9995 * 10**power:
            return f"{number / 10**power:.3g}{unit}"
    return f"{number:.3g}"


def _number(value: Any) -> float:
    number = float("nan") if value is None else float(value)
    return number if np.isfinite(number) else float("nan")


def _parameters(folder: Path) -> int | None:
    """Return how many parameters the run's model has."""
    try:
        options = read_json(folder / "run_config.json")
        sizes = {name: options[name] for name in ("vocab_size", "seq_length", "d_model", "num_layers", "d_ff")}
        kinds = {name: options[name] for name in ("tie_weights", "bias") if name in options}
        c = ModelConfig(**sizes, **kinds)
        vectors = (
            c.num_layers * (9 * c.d_model + c.d_ff) + 2 * c.d_model if c.bias else (2 * c.num_layers + 1) * c.d_model
        )
        return c.matrix_elements + vectors + (0 if c.tie_weights else c.vocab_size * c.d_model)
    except (OSError, ValueError, KeyError, TypeError):
        return None
