"""Lets trainers take turns at the same updates, each in a process of its own, and measures their rates.

All see the same machine, and a round's ratios are taken between neighbours: other programs disturb rates, and ratios less.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from train_contenders import SIZES, draw_weights, flops_per_token

from gpt2xla.logs.peak_flops import named_peak_flops

CONTENDERS = Path(__file__).with_name("train_contenders.py")
KEEP_MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str
    peer: Path | None = None
    compile: bool = False
    tuned: bool = False
    is_compared: bool = False  # whether its losses are compared with ours
    may_shrink: bool = False  # whether it takes half of the batch where the whole one does not fit


@dataclass(frozen=True)
class Turns:
    """How often contenders take turns. `updates` is timed updates per turn, `curve` those whose losses are compared."""

    rounds: int
    updates: int
    curve: int
    profiled: frozenset[str] = frozenset()  # names of those whose costs are taken apart


class EndedEarly(RuntimeError):
    """A contender's process has ended; its error is on standard error."""


class Running:
    """A contender in its process."""

    def __init__(self, contender: Contender, folder: Path, batch: int, precision: str, device: str) -> None:
        environment = {**os.environ, "USE_TORCH_XLA": "0"}  # or transformers' Trainer would take XLA's CPU
        environment |= {"GLIBC_TUNABLES": KEEP_MEMORY} if contender.tuned else {}
        command = [sys.executable, "-W", "ignore", CONTENDERS, "--contender", contender.kind, "--folder", folder]
        command += ["--batch", batch, "--device", device]
        command += ["--peer", contender.peer] if contender.peer else []
        command += ["--precision", precision] if precision != "fp32" else []
        command += [f"--{name}" for name in ("compile", "tuned") if getattr(contender, name)]
        self.name, self.batch = contender.name, batch
        self.process = subprocess.Popen(
            [str(part) for part in command], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def train(self, updates: int) -> dict[str, Any]:
        return self._ask(str(updates))

    def profile(self) -> dict[str, Any]:
        return self._ask("profile")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise EndedEarly(f"{self.name} ended early, with exit code {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        self.process.communicate()


def measure(
    chosen: list[Contender],
    size: str,
    precision: str,
    device: str,
    turns: Turns,
    batch: int | None = None,
    after_round: Callable[[dict[str, Any]], None] = lambda run: None,
) -> dict[str, Any]:
    """Return rates, losses, memory and costs of all contenders by name. `left_out` tells which have failed, and how.

    `after_round` gets what is known after each round, and after the profiles."""
    options, *batches = SIZES[size]
    batch = batch or batches[device != "cpu"]
    by_name = "batches", "curves", "tokens_per_second", "profiles", "memory_bytes", "first_update_seconds", "left_out"
    run: dict[str, Any] = {"size": size, "precision": precision, "batch": batch, **{key: {} for key in by_name}}
    run["host_seconds_per_update"] = {}
    run["peak_flops"] = named_peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    with tempfile.TemporaryDirectory() as name:
        config = draw_weights(Path(name), options)
        run |= {"seq_length": config.seq_length, "flops_per_token": flops_per_token(config)}
        running: list[Running] = []

        def leave_out(name: str, error: EndedEarly) -> None:
            run["left_out"][name] = str(error)
            print(size, precision, error, flush=True)

        for contender in chosen:  # the first turn also compiles
            try:
                started, answer = _start(contender, Path(name), batch, precision, device, turns.curve - 1)
            except EndedEarly as error:
                leave_out(contender.name, error)
                continue
            running.append(started)
            run["batches"][started.name], run["curves"][started.name] = started.batch, answer["losses"]
            run["first_update_seconds"][started.name] = answer["first_seconds"]
            print(size, precision, f"{started.name}: ready, loss {answer['losses'][-1]:.4f}", flush=True)
        for number in range(turns.rounds):
            for one in list(running):
                try:
                    turn = one.train(turns.updates)
                except EndedEarly as error:
                    running.remove(one)
                    leave_out(one.name, error)
                    continue
                seconds = statistics.median(turn["seconds"])
                rates = run["tokens_per_second"].setdefault(one.name, [])
                rates.append(one.batch * config.seq_length / seconds)
                run["memory_bytes"][one.name] = turn["memory"]
                run["host_seconds_per_update"][one.name] = turn["host_seconds"]
                print(size, precision, number + 1, f"{one.name}: {rates[-1]:,.0f} tokens/s", flush=True)
            after_round(run)
        for one in running:
            if one.name in turns.profiled:
                run["profiles"][one.name] = one.profile()
        after_round(run)
        for one in running:
            one.end()
    return run


def _start(
    contender: Contender, folder: Path, batch: int, precision: str, device: str, curve: int
) -> tuple[Running, dict[str, Any]]:
    while True:
        running = Running(contender, folder, batch, precision, device)
        try:
            return running, running.train(curve if contender.is_compared else 0)
        except EndedEarly:
            if not contender.may_shrink or batch == 1:
                raise
            batch //= 2


def table(runs: list[dict[str, Any]]) -> str:
    """Return what `measure` returned, as Markdown."""
    lines = ["| model, precision | | tokens/s | ours is faster by | MFU |", "|---|---|---|---|---|"]
    notes = []
    for run in runs:
        name = f"{run['size']}, {run['batch']} x {run['seq_length']}, {run['precision']}"
        rates, peak = run["tokens_per_second"], run["peak_flops"]
        for contender, profile in run["profiles"].items():
            if costs := largest_costs(profile):
                notes.append(f"- {name}: the three largest costs of {contender}: {costs}.")
        for contender, values in rates.items():
            ratios = [own / theirs for own, theirs in zip(rates.get("ours", []), values, strict=False)]
            mfu = f"{statistics.median(values) * run['flops_per_token'] / peak:.1%}" if peak else ""
            smaller = f" ({run['batches'][contender]} sequences)" if run["batches"][contender] != run["batch"] else ""
            ratio = spread(ratios, ".2f") if ratios else ""
            lines.append(f"| {name} | {contender}{smaller} | {spread(values, ',.0f')} | {ratio} | {mfu} |")
        for contender, apart in losses_apart(run).items():
            theirs = run["curves"][contender]
            notes.append(
                f"- {name}: over {len(theirs)} updates (loss {theirs[0]:.3f} to {theirs[-1]:.3f}) our losses and "
                f"{contender}'s are at most {apart:.1e} apart."
            )
        notes += [f"- {name}: {reason}." for reason in run["left_out"].values()]
    return "\n".join([*lines, "", *notes]) + "\n"


def losses_apart(run: dict[str, Any]) -> dict[str, float]:
    """Return the largest distance of a loss from ours, of those whose losses are compared."""
    own = run["curves"].get("ours", [])
    return {
        name: max(abs(a - b) for a, b in zip(own, theirs, strict=True))
        for name, theirs in run["curves"].items()
        if name != "ours" and len(theirs) == len(own) > 1
    }


def largest_costs(profile: dict[str, Any], count: int = 3) -> str:
    """Return a profile's largest costs and their shares of the time."""
    whole = profile["seconds"]
    return ", ".join(f"`{name[:60]}` {seconds / whole:.0%}" for name, seconds, _ in profile["costs"][:count])


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
