"""NaN and infinity in loss or gradient, on one process only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from gpt2xla.checkpoint import run_folder
from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.windows import Batch
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.training.train_step import TrainStep
from tests.faults import comparing, recording, runs
from tests.faults.cases import Row, Setting, check_all, clear

_AT = 17  # the step, from 1, at which it happens first
_VALUES = {"NaN": math.nan, "infinity": math.inf, "-infinity": -math.inf}


def nonfinite(setting: Setting) -> list[Row]:
    cases = [
        (what, value, world, victim)
        for world, victims in ((1, (0,)), (2, (0, 1)))
        for victim in victims
        for what in ("loss", "gradient", "one gradient")
        for value in _VALUES
    ]
    cases = cases if setting.full else cases[::7]
    bar = (
        "no process applies the update; all stop at that step with 1 and one line that names step and windows; nothing is "
        "saved after"
    )
    fails = Row("NaN or infinity in loss or gradient, on one process", bar)
    check_all(fails, cases, partial(_fails, setting))
    bar = "those updates are left out, on all processes; `skipped` counts them; one more than N ends the run with 1"
    skips = Row("the same with --skip-nonfinite N", bar)
    check_all(
        skips, [(*case, n) for case in cases for n in (1, 3)][:: 1 if setting.full else 3], partial(_skips, setting)
    )
    return [fails, skips]


def _inject(what: str, value: float, steps: set[int]) -> None:
    """In the process of a run: spoil loss or gradient in these steps, from 1."""
    update, forward, now = TrainStep.__call__, GPT2.forward, [0]

    def noted(self: TrainStep, batches: Iterator[Batch], step: int, phase: Phase, counted: int) -> Any:
        now[0] = step + 1
        return update(self, batches, step, phase, counted)

    def spoiled(self: GPT2, *args: Any, **kwargs: Any) -> Any:
        loss, *rest = forward(self, *args, **kwargs)
        if now[0] in steps:
            if what == "loss":
                loss = loss * value
            else:
                # The value stays, but the gradient changes: all of it, or that of a single weight.
                weight = self.h[0].attn.c_attn.weight if what == "gradient" else self.ln_f.weight
                whole = weight.sum() if what == "gradient" else weight.view(-1)[3]
                loss = loss + _Spoils.apply(whole, value)
        return loss, *rest

    TrainStep.__call__ = noted  # type: ignore[method-assign]
    GPT2.forward = spoiled  # type: ignore[method-assign]


class _Spoils(torch.autograd.Function):
    """Returns 0, with a gradient of `value`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.full_like(gradient, ctx.value), None


def _prepare(folder: Any, what: str, value: str, victim: int, steps: set[int], rank: int) -> None:
    recording.record(folder.with_name(f"{folder.name}.weights-{rank}"), weights=True)
    if rank == victim:
        _inject(what, _VALUES[value], steps)


def _weights(folder: Any, world: int) -> list[list[dict[str, Any]]]:
    return [recording.read(folder, rank, "weights") for rank in range(world)]


def _fails(setting: Setting, case: tuple[str, str, int, int]) -> None:
    what, value, world, victim = case
    folder = setting.folder / "-".join(map(str, ("fails", *case))).replace(" ", "_")
    flags = [*setting.data, *runs.SMALL_RUN]
    with runs.started(flags, folder, world, partial(_prepare, folder, what, value, victim, {_AT})) as run:
        codes = run.wait(60)
        text = run.text
    assert codes == [1] * world, f"exit codes {codes}: {text[-600:]}"
    _check_message(run, _AT)
    for lines in _weights(folder, world):
        assert lines[-1]["step"] == _AT, f"a process went on to step {lines[-1]['step']}"
        assert lines[-1]["before"] == lines[-1]["after"], "the update was applied"
        assert lines[-2]["before"] != lines[-2]["after"], "updates are not seen"
    assert [f.name for f in run_folder.list_checkpoints(folder)] == ["step-00000006", "step-00000012"]
    comparing.check_no_litter(folder)
    runs.finish(flags, folder, world)  # nothing of it is left
    comparing.check_same(folder, setting.unbroken[world], world)
    clear(folder)


def _check_message(run: runs.Run, step: int) -> None:
    for process in run.processes[:1]:
        errors = [line for line in process.text.splitlines() if "error:" in line]
        assert len(errors) == 1, process.text[-800:]
        assert f"step {step}" in errors[0], errors[0]
        assert "windows" in errors[0], errors[0]
    assert "Traceback" not in run.text, run.text[-800:]


def _skips(setting: Setting, case: tuple[str, str, int, int, int]) -> None:
    what, value, world, victim, allowed = case
    folder = setting.folder / "-".join(map(str, ("skips", *case))).replace(" ", "_")
    flags = [*setting.data, *runs.SMALL_RUN, "--skip-nonfinite", allowed]
    steps = {_AT + 3 * n for n in range(allowed)}
    with runs.started(flags, folder, world, partial(_prepare, folder, what, value, victim, steps)) as run:
        codes = run.wait()
        assert codes == [0] * world, f"exit codes {codes}: {run.text[-600:]}"
    for lines in _weights(folder, world):
        left_out = {line["step"] for line in lines if line["before"] == line["after"]}
        assert left_out == steps, f"left out: {sorted(left_out)}, not {sorted(steps)}"
    skipped = [line["skipped"] for line in comparing.metrics(folder) if "skipped" in line]
    assert skipped == [sum(s <= step for s in steps) for step in range(1, runs.STEPS + 1)], "`skipped` counts otherwise"
    clear(folder)
    one_more = steps | {max(steps) + 2}
    with runs.started(flags, folder, world, partial(_prepare, folder, what, value, victim, one_more)) as run:
        codes = run.wait()
        assert codes == [1] * world, f"exit codes {codes} after one more: {run.text[-600:]}"
        _check_message(run, max(one_more))
    clear(folder)
