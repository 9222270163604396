"""Compares a disturbed run with an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.faults import recording
from tests.faults.runs import STEPS

_EXACT = ("loss", "grad_norm", "lr", "tokens", "valid_loss", "valid_tokens", "valid_standard_error")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}


def check_same(
    folder: Path, unbroken: Path, world: int = 1, windows: bool = True, steps: int = STEPS, after: int = 0
) -> None:
    """Raise AssertionError with the first difference in the training and validation lines, the windows that the steps read,
    or the weights and optimizer state of the last checkpoint. With `windows`, the run must have recorded them.
    The run in `folder` began with a checkpoint of another one `after` that step."""
    got, expected = _lines(folder), [line for line in _lines(unbroken) if line["step"] > after]
    assert [line["step"] for line in got] == [line["step"] for line in expected], "steps in metrics.jsonl differ"
    for a, b in zip(got, expected, strict=True):
        assert a == b, f"metrics.jsonl: {a} where the unbroken run has {b}"
    if windows:
        read, should = recording.windows(folder, world), recording.windows(unbroken, world)
        should = {step: found for step, found in should.items() if step > after}
        assert read.keys() == should.keys(), "other steps were taken"
        for step, found in read.items():
            assert found == should[step], f"step {step} read other windows"
    last = f"step-{steps:08d}"
    _check_tensors(load_file(folder / last / "model.safetensors"), load_file(unbroken / last / "model.safetensors"))
    ours, theirs = (torch.load(f / last / "training_state.pt", weights_only=True) for f in (folder, unbroken))
    for moment in ("exp_avg", "exp_avg_sq"):
        _check_tensors(ours["optimizer"][moment], theirs["optimizer"][moment])
    assert ours["step"] == theirs["step"] == steps
    assert os.readlink(folder / "latest") == last, "the link to the newest checkpoint is an old one"
    check_no_litter(folder)


def check_no_litter(folder: Path) -> None:
    litter = [path.name for path in folder.glob("**/*") if path.name.endswith(".partial")]
    assert not litter, f"left behind: {litter}"


def check_close(folder: Path, unbroken: Path, relative: float = 1e-5) -> float:
    """Return the largest relative difference of the losses. Raises AssertionError if it is more than `relative`."""
    a, b = losses(folder), losses(unbroken)
    assert a.keys() == b.keys(), "other steps were logged"
    worst = max(abs(a[step] - b[step]) / abs(b[step]) for step in a)
    assert worst <= relative, f"losses differ by {worst:.1e} relative"
    return worst


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [
        {"step": line["step"]} | {key: _hex(line[key]) for key in _EXACT if key in line} for line in metrics(folder)
    ]


def _hex(value: Any) -> Any:
    return value.hex() if isinstance(value, float) and math.isfinite(value) else value


def _check_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.numpy().tobytes() == b[name].numpy().tobytes(), f"{name} differs"
