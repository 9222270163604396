#!/usr/bin/env python
"""The loss curve that scripts/tpu_report.py compares TPUs with: makes gpt2xla/tpu_check/curve.json (ten minutes on 2 cores).

The curve is that of the torch runtime on a CPU in fp32. Beside it stand, by precision, the distances of correct runs: other
runtimes, and other first weights, each from the fp32 run with the same weights. From these the report takes its bounds. Last
come the distances of runs with a fault, which the bounds must tell from correct ones.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpt2xla.tpu_check.curve import Lines, distance, known_run, read_lines

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "gpt2xla" / "tpu_check" / "curve.json"
SEEDS = (1, 2)
# XLA as ever, but LLVM makes its machine code quickly instead of well.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# Faults, each some lines that are run first. They are made in fp32, so that nothing hides them.
_ATTENTION = """
import torch, torch.nn.functional as F
plain = F.scaled_dot_product_attention
F.scaled_dot_product_attention = lambda q, k, v, *_, **__: {}
"""
_RUNTIME = """
from gpt2xla.runtime.one_device import OneDevice
plain = OneDevice.{0}
def faulty(self, {1}
OneDevice.{0} = faulty
"""
_TO_BF16 = "\n    for p in model.parameters(): p.data.copy_(p.data.bfloat16())"
FAULTS = {
    "attention sees the next token": _ATTENTION.format("plain(q, k, v, torch.ones(256, 256).tril(1).bool())"),
    "attention's last 128 queries miss the first keys": _ATTENTION.format(
        "plain(q, k, v, torch.ones(256, 256).tril().bool() & ~torch.ones(256, 256).tril(-128).bool())"
    ),
    "scores of attention twice as large": _ATTENTION.format("plain(q, k, v, is_causal=True, scale=0.25)"),
    "no gradient through queries": _ATTENTION.format("plain(q.detach(), k, v, is_causal=True)"),
    "no gradient through values": _ATTENTION.format("plain(q, k, v.detach(), is_causal=True)"),
    "gradients of half the size": _RUNTIME.format("backward", "loss): plain(self, loss / 2)"),
    "weights in bf16": _RUNTIME.format(
        "optimizer_step", f"model, *a, **k):\n    found = plain(self, model, *a, **k){_TO_BF16}\n    return found"
    ),
}


def main() -> None:
    curve: dict[str, Any] = {
        "made": f"{datetime.date.today()} by python benchmarks/loss_curve.py, torch {torch.__version__}", "losses": [],
        "grad_norms": [], "measured": {"none": {}, "bf16": {}}, "faults": {},
    }  # fmt: skip
    for seed in SEEDS:
        exact = run("torch", seed, "none")
        if seed == SEEDS[0]:
            first = exact
            curve |= {"losses": [line["loss"] for line in first], "grad_norms": [line["grad_norm"] for line in first]}
        for runtime, precision in (("torch", "bf16"), ("XLA", "none"), ("XLA", "bf16")):
            found = apart(run(runtime, seed, precision), exact)
            curve["measured"][precision][f"{runtime}, seed {seed}"] = found
            write(curve)
    for name, fault in FAULTS.items():
        curve["faults"][name] = apart(run("torch", SEEDS[0], "none", fault), first)
        write(curve)


def write(curve: dict[str, Any]) -> None:
    FILE.write_text(json.dumps(curve, indent=1) + "\n")
    print(json.dumps({name: curve[name] for name in ("measured", "faults")}), flush=True)


def run(runtime: str, seed: int, precision: str, fault: str = "") -> Lines:
    """Return the lines of the known run with other first weights."""
    with tempfile.TemporaryDirectory(prefix="gpt2xla-") as name:
        folder = Path(name)
        flat = known_run(folder, seed=seed, mixed_precision=precision).given_options()
        (folder / "run.json").write_text(json.dumps(flat))
        program = "run_pretrain_xla.py" if runtime == "XLA" else "run_pretrain.py"
        start = f"{fault}\nimport runpy, sys; sys.argv = {[program, '--config', str(folder / 'run.json')]!r}\n"
        start += (
            f"sys.argv += ['--attention', 'sdpa'] * {bool(fault)}\nrunpy.run_path({program!r}, run_name='__main__')"
        )
        environment = os.environ | {"PJRT_DEVICE": "CPU", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": QUICK}
        subprocess.run([sys.executable, "-c", start], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return read_lines(folder)


def apart(lines: Lines, exact: Lines) -> dict[str, float]:
    """Return the distance of a run from another, in 3 digits."""
    found = distance(lines, [line["loss"] for line in exact], [line["grad_norm"] for line in exact])
    return {name: float(f"{value:.3g}") for name, value in found.items()}


if __name__ == "__main__":
    main()
