"""A short training run whose losses are known: a device that computes wrongly gets others.

`curve.json` holds the losses and gradient norms of the run on a CPU in fp32, and how far from them correct runs in other
precisions were. `python benchmarks/loss_curve.py` makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt2xla.config import RunConfig
from gpt2xla.files import read_json

STEPS, WARMUP = 50, 5
LEAST_STEPS = WARMUP + 1  # of a run that stops early
# 8 sequences divide over 1, 2, 4 and 8 devices. Heads of 64 columns and 256 tokens suit flash attention. The loss is
# computed in pieces, as that of larger models is.
MODEL = {"vocab_size": 512, "seq_length": 256, "d_model": 128, "num_layers": 2, "num_heads": 2}
RUN = {
    **MODEL, "seed": 1, "train_batch_size": 8, "gradient_accum_step": 1, "loss_chunks": 4, "learning_rate": 0.002,
    "min_lr": 0.0002, "warmup_steps": WARMUP, "decay_steps": STEPS,
}  # fmt: skip
# Correct runs may be so many times as far from the curve as those that were measured; and at least as far as a CPU that adds
# in another order may be, in fp32.
_FACTOR = 2.0
_LEAST = {"largest": 1e-4, "mean": 1e-4, "grad_norm": 1e-3}
_FAR = 1e9
_FILE = Path(__file__).with_name("curve.json")
Lines = list[dict[str, Any]]  # of metrics.jsonl


def run_in(folder: Path, options: dict[str, Any], steps: int, rows: int) -> RunConfig:
    """Return a run of so many updates in `folder`, of synthetic data that are written there: `rows` sequences."""
    import numpy as np  # for which --help must not wait

    from gpt2xla.data.synthetic import synthetic_tokens

    vocabulary, length = options["vocab_size"], options["seq_length"]
    for name, count, seed in (("train", rows + 1, 0), ("test", options["eval_batch_size"] + 1, 1)):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "tokens.npy", synthetic_tokens(count, length, vocabulary, seed).ravel())
    fixed = {
        "train_dir": str(folder / "train"), "valid_dir": str(folder / "test"),
        "checkpoints_dir": str(folder / "checkpoints"), "train_steps": steps, "valid_steps": 1, "valid_interval": 0,
        "save_interval": 0,
    }  # fmt: skip
    return RunConfig.from_flat(options | fixed)


def known_run(folder: Path, steps: int = STEPS, **changes: Any) -> RunConfig:
    """Return the run of the curve, or its first steps, in `folder`. Its data are written there."""
    return run_in(folder, RUN | {"eval_batch_size": RUN["train_batch_size"]} | changes, steps, STEPS * 8)


def read_lines(folder: Path) -> Lines:
    """Return the lines of the updates of a run in `folder`, as far as it came."""
    file = folder / "checkpoints" / "metrics.jsonl"
    whole = file.read_text().split("\n")[:-1] if file.exists() else []
    return [line for line in map(json.loads, whole) if "loss" in line]


def distance(lines: Lines, losses: list[float], grad_norms: list[float]) -> dict[str, float]:
    """Return how far a run, which may be shorter, is from losses (nats per token) and, relatively, from gradient norms."""
    apart = [abs(_number(line["loss"]) - loss) for line, loss in zip(lines, losses, strict=False)]
    norms = [abs(_number(line["grad_norm"]) / norm - 1) for line, norm in zip(lines, grad_norms, strict=False)]
    return {"largest": max(apart), "mean": sum(apart) / len(apart), "grad_norm": max(norms)}


def compare(lines: Lines, precision: str) -> dict[str, Any]:
    """Return the `distance` from the curve of a run in `precision`, the `bounds` and whether it `agrees`. Without bounds for
    that precision, both are None."""
    curve = read_json(_FILE)
    found: dict[str, Any] = distance(lines, curve["losses"], curve["grad_norms"])
    measured = curve["measured"].get(precision)
    if measured is None:
        return found | {"bounds": None, "agrees": None}
    bounds = {name: max(_LEAST[name], _FACTOR * max(run[name] for run in measured.values())) for name in found}
    return found | {"bounds": bounds, "agrees": all(found[name] <= bounds[name] for name in bounds)}


def _number(value: float | None) -> float:
    return _FAR if value is None else value  # as metrics.jsonl writes what is not finite
