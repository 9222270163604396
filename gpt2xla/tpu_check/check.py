"""Trace a run's training step, compile it for TPUs, and say whether it fits and what it costs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt2xla.config import RunConfig, XlaConfig
from gpt2xla.config.batch import MICRO_STEPS
from gpt2xla.data.batch_plan import BatchPlan
from gpt2xla.errors import InputError, RunFailed, counted
from gpt2xla.runtime.xla import compiler_flags
from gpt2xla.tpu_check.topologies import TOPOLOGIES, Topology
from gpt2xla.tpu_check.traced_step import graph_in
from gpt2xla.tpu_check.where import Work, summary

_MOST_SEQUENCES = 1024  # per device and micro-step; beyond, nothing is gained
# What a machine with devices sets for its own runs. LIBTPU_INIT_ARGS stays: a run's compiler obeys it, too.
_SKIPPED_VARIABLES = ("PJRT_DEVICE", "TPU_", "XLA_", "CPU_NUM", "JAX_")


def check(config: RunConfig, options: XlaConfig, topology: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Compile the step of `config` for the devices of one host of `topology`.

    Return what docs/will-it-fit.md describes: fits, peak_gib of memory_gib, largest, flops, bytes, cycles,
    estimated_seconds, roofline_seconds, compile_seconds, trace_ms and others; sizes and costs are of one device and one
    update. Raises InputError if the batch does not divide over the devices, and RunFailed, which names the error, if tracing
    or compiling fails."""
    found = TOPOLOGIES[topology]
    share, rest = divmod(config.train.micro_batch_size, found.devices)
    if rest or not share:
        raise InputError(
            f"--train-batch-size {config.train.micro_batch_size} does not divide over the {found.devices} devices of "
            f"{topology}; use a multiple of {found.devices}"
        )
    with tempfile.TemporaryDirectory(prefix="gpt2xla-") as folder:
        say(f"{topology}: tracing {counted(share, 'sequence')} per device ...")
        graph, trace = _trace(Path(folder), config, options, found)
        say(f"{topology}: compiling ...")
        request = {"topology": topology, "graph": graph, "replicas": found.devices, "spmd": options.spmd}
        flags = compiler_flags.with_ours(os.environ.get(compiler_flags.VARIABLE), found.kind, fsdp=options.fsdp)
        compiled = _compile(Path(folder), request, flags)
        report = {"topology": topology, "sequences_per_device": share, "compiler_flags": flags, **trace, **compiled}
        if compiled["fits"]:
            report |= _costs(config, found, compiled)
            kernels = report.pop("kernels")
            each = _kernel_cycles(Path(folder), config, found, share, kernels, flags) if kernels else {}
            report["kernels"] = [
                {"name": kernel["name"], "calls": kernel["calls"], "cycles": each[key] * kernel["calls"]}
                for key, kernel in kernels.items()
            ]
            report["kernel_cycles"] = sum(kernel["cycles"] for kernel in report["kernels"])
            report["cycles"] += report["kernel_cycles"]
            report["estimated_seconds"] = report["cycles"] / found.clock
            report["where"] = summary([Work(**group) for group in report.pop("work")], each, found)
    return report


def find_batch(
    config: RunConfig,
    options: XlaConfig,
    topology: str,
    say: Callable[[str], None],
    tolerance: float = 0.0,
    first: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the report of the most sequences per device and micro-step that fit, or that of one if not even one fits.

    The report also holds `too_many`, the fewest that did not fit. The search stops when the two differ by no more than
    `tolerance`, as a share of what fits. It begins with the numbers in `first`, as far as they may still be the answer."""
    devices = TOPOLOGIES[topology].devices
    tried: dict[int, dict[str, Any]] = {}
    best, too_many = 0, _MOST_SEQUENCES + 1
    tries = list(first) or [_first_try(config, options, TOPOLOGIES[topology])]
    steps = config.train.gradient_accum_step or MICRO_STEPS
    while too_many - best > max(1.0, tolerance * best):
        share = tries[0]
        train = dataclasses.replace(
            config.train, train_batch_size=share * devices, gradient_accum_step=steps, sequences_per_update=None
        )
        report = tried[share] = check(dataclasses.replace(config, train=train), options, topology, say)
        verdict = "fits" if report["fits"] else "does not fit"
        say(f"{topology}: {share} per device: {report['peak_gib']:.2f} of {report['memory_gib']:.2f} GiB, {verdict}")
        if report["fits"]:
            best = share
        else:
            too_many = share
        tries = [share for share in tries if best < share < too_many] or [_next_try(config, report, best, too_many)]
    return tried[max(best, 1)] | {"too_many": too_many}


def with_largest_updates(config: RunConfig, topology: str) -> RunConfig:
    """Return the run whose updates all are as large as the largest ones of its --batch-ramp, if it has one.

    Raises InputError if these do not divide over the devices."""
    if config.train.batch_ramp is None:
        return config
    if config.train.train_batch_size == "auto":
        train = dataclasses.replace(config.train, batch_ramp=None, sequences_per_update=config.train.sequences)
        return dataclasses.replace(config, train=train)
    largest = max(BatchPlan.of(config.train, TOPOLOGIES[topology].devices).phases, key=lambda phase: phase[1:])
    return dataclasses.replace(config, train=dataclasses.replace(largest.options(config.train), batch_ramp=None))


def check_chosen(config: RunConfig, options: XlaConfig, topology: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the report of the micro-batch that --train-batch-size auto chooses on these devices, by the same rules."""
    from gpt2xla.runtime.trial import Trial  # they import torch, for which --help must not wait
    from gpt2xla.runtime.xla.memory import XlaMemory

    found, reports = TOPOLOGIES[topology], dict[int, dict[str, Any]]()

    class CompiledTrial(Trial):
        def update(self, share: int) -> None:
            report = reports[share] = check(self.config_of(share), options, topology, say)
            if not report["fits"]:
                used, memory = report["peak_gib"], report["memory_gib"]
                say(f"{topology}: {share} per device: {used:.2f} of {memory:.2f} GiB, refused")
                raise RuntimeError(f"Used {used}G of {memory}G hbm")  # in the compiler's words

    trial = CompiledTrial(config, found.devices)
    share = XlaMemory(found.kind, options, found.devices if options.fsdp else 1).most_that_fit(trial)
    train = trial.config_of(share).train
    say(f"{topology}: auto is --train-batch-size {train.micro_batch_size} --gradient-accum-step {train.micro_steps}")
    return reports[share] if share in reports else check(trial.config_of(share), options, topology, say)


def _first_try(config: RunConfig, options: XlaConfig, topology: Topology) -> int:
    from gpt2xla.runtime.memory import STATE_BYTES, compiled_sequence_bytes

    state = STATE_BYTES * config.model.matrix_elements / (topology.devices if options.fsdp else 1)
    room = int((topology.memory * 2**30 - state) / compiled_sequence_bytes(config.model, config.train))
    return min(max(1, room), _MOST_SEQUENCES)


def _next_try(config: RunConfig, last: dict[str, Any], best: int, too_many: int) -> int:
    """Return the batch half way between one that fits and one that does not.

    Before both are known, return the batch that would fill the memory, but at least a quarter more than one that fits: near
    the limit the compiler computes things twice, and memory hardly grows any more."""
    if best and too_many <= _MOST_SEQUENCES:
        return (best + too_many) // 2
    from gpt2xla.runtime.memory import compiled_sequence_bytes

    room = (last["memory_gib"] - last["peak_gib"]) * 2**30
    guess = last["sequences_per_device"] + int(room / compiled_sequence_bytes(config.model, config.train))
    least = best + max(1, best // 4) if best else 1
    return min(max(guess, least), too_many - 1)


def _kernel_cycles(
    folder: Path, config: RunConfig, topology: Topology, share: int, kernels: dict[str, dict[str, Any]], flags: str
) -> dict[str, int]:
    """Return the cycles of one call of each kernel: of its schedule, of its products or of its traffic, whichever are most.

    A schedule knows neither how long a product keeps a matrix unit busy, nor how long memory takes."""
    model = config.model
    sizes = [share, model.seq_length, model.num_heads, model.d_model // model.num_heads]
    name = next(name for name, found in TOPOLOGIES.items() if found is topology)
    request = {"topology": name, "kernels": kernels, "documents": sizes if config.train.document_mask else None}
    scheduled = _compile(folder, request, flags)
    return {
        key: max(
            scheduled[key],
            round(kernel["flops"] / topology.flops_per_cycle),
            round(kernel["bytes"] / topology.bytes_per_cycle),
        )
        for key, kernel in kernels.items()
    }


def _costs(config: RunConfig, topology: Topology, compiled: dict[str, Any]) -> dict[str, Any]:
    compute, memory = compiled["flops"] / topology.flops, compiled["bytes"] / topology.bandwidth
    return {
        # No step can be faster than its products at the device's peak, or its traffic at full bandwidth.
        "roofline_seconds": max(compute, memory),
        "roofline_bound": "compute" if compute > memory else "memory",
        "tokens_per_step": config.train.micro_batch_size * config.train.micro_steps * config.model.seq_length,
    }


def _trace(folder: Path, config: RunConfig, options: XlaConfig, topology: Topology) -> tuple[str, dict[str, Any]]:
    request = {
        "config": config.to_flat(),
        "options": {field.name: getattr(options, field.name) for field in dataclasses.fields(XlaConfig)},
        "device_kind": topology.kind,
        "replicas": topology.devices,
        "output": str(folder),
    }
    process = _run("gpt2xla.tpu_check.traced_step", folder, request)
    graph = graph_in(folder)
    if graph is None:
        raise _failed("tracing", process)
    return str(graph), json.loads((folder / "trace.json").read_text())


def _compile(folder: Path, request: dict[str, Any], flags: str) -> dict[str, Any]:
    answer = folder / "compiled.json"
    process = _run("gpt2xla.tpu_check.compile", folder, request | {"output": str(answer)}, flags)
    if process.returncode:
        raise _failed("compiling", process)
    return json.loads(answer.read_text())


def _run(module: str, folder: Path, request: dict[str, Any], flags: str = "") -> subprocess.CompletedProcess[str]:
    """Run `module` on `request` in its own process: each needs its own environment and its own XLA. Its compiler gets
    `flags`."""
    file = folder / "request.json"
    file.write_text(json.dumps(request))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_SKIPPED_VARIABLES)}
    environment["TMPDIR"] = str(folder)  # if it is killed, what it leaves is removed with the folder
    environment[compiler_flags.VARIABLE] = flags
    command = [sys.executable, "-m", module, str(file)]
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # inside Popen they would leave a process behind
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        said = process.communicate()
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, *said)


def _failed(what: str, process: subprocess.CompletedProcess[str]) -> RunFailed:
    lines = [line for line in process.stderr.strip().split("\n") if line]
    return RunFailed(f"{what} failed: {lines[-1] if lines else f'exit code {process.returncode}'}")
