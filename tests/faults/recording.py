"""Records what a run reads and updates: the run itself writes a file, one line for each step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.windows import Batch
from gpt2xla.training.train_step import TrainStep


def record(file: Path, weights: bool = False) -> None:
    """Let each update of this process add a line to `file`: its step, from 1, and the windows that it read. With `weights`,
    the line also has the weights' hashes before and after."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    update = TrainStep.__call__

    def recorded(self: TrainStep, batches: Iterator[Batch], step: int, phase: Phase, counted: int) -> Any:
        windows: list[str] = []
        line: dict[str, Any] = {"step": step + 1, "windows": windows}
        if weights:
            line["before"] = _hash_of(self.model)
        try:
            return update(self, _watched(batches, windows), step, phase, counted)
        finally:
            if weights:
                line["after"] = _hash_of(self.model)
            os.write(descriptor, (json.dumps(line) + "\n").encode())

    TrainStep.__call__ = recorded  # type: ignore[method-assign]


def _watched(batches: Iterator[Batch], windows: list[str]) -> Iterator[Batch]:
    for batch in batches:
        for ids, labels in zip(batch.input_ids.cpu().numpy(), batch.labels.cpu().numpy(), strict=True):
            windows.append(hashlib.blake2b(ids.tobytes() + labels.tobytes(), digest_size=6).hexdigest())
        yield batch


def _hash_of(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def read(folder: Path, rank: int = 0, kind: str = "steps") -> list[dict[str, Any]]:
    """Return the lines that one process of the run in `folder` recorded, over all its starts."""
    return [json.loads(text) for text in folder.with_name(f"{folder.name}.{kind}-{rank}").read_text().splitlines()]


def windows(folder: Path, world: int = 1) -> dict[int, list[str]]:
    """Return the windows that each step read, on all processes together. Raises AssertionError if a repeated step read
    other windows."""
    by_step: dict[int, list[str]] = {}
    for rank in range(world):
        own: dict[int, list[str]] = {}
        for line in read(folder, rank):
            before = own.setdefault(line["step"], line["windows"])
            assert before == line["windows"], f"step {line['step']} was taken again with other windows"
        for step, found in own.items():
            by_step.setdefault(step, []).extend(found)
    return by_step
