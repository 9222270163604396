"""Pre-train GPT-2 on TPUs through PyTorch/XLA: `PJRT_DEVICE=TPU python run_pretrain_xla.py ...`.

`PJRT_DEVICE=CPU` takes the same path on any machine, `CPU_NUM_DEVICES=2` with two replicas.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, XlaConfig
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.processes.exits import REPORT_ONCE
from gpt2xla.runtime.xla.environment import importing_torch_xla, prepare

if TYPE_CHECKING:  # they import torch, for which --help must not wait
    from gpt2xla.processes.signals import StopSignals
    from gpt2xla.runtime.xla.runtime import XlaRuntime


def main(argv: Sequence[str] | None = None, work: Callable[..., None] | None = None) -> None:
    """Run with `argv`, by default the process's own arguments. A notebook's kernel may call it several times.

    `work` is what trains in each process, called as `worker` is, which it is by default."""
    config, options = parse_run(XlaConfig, argv)
    config.check_early()
    if options.fsdp and not options.spmd:
        raise InputError("--fsdp needs --spmd; add it")
    prepare(os.environ, fsdp=options.fsdp)
    flags = os.environ.get("XLA_FLAGS")  # before torch_xla adds its own
    if config.train.deterministic and os.environ["PJRT_DEVICE"] == "CUDA":
        os.environ["XLA_FLAGS"] = f"{flags or ''} --xla_gpu_deterministic_ops=true"
    with importing_torch_xla():
        import torch_xla

    # Nothing may touch a device before this: the workers could not have it then.
    if torch_xla._XLAC._xla_runtime_is_initialized():
        raise InputError("this process uses the device already, so its workers cannot; restart the notebook's kernel")
    from gpt2xla.processes.signals import StopSignals

    try:
        with StopSignals() as signals:
            launch(config, options, signals, work or worker)
    except BrokenProcessPool:
        hint = f"; XLA_FLAGS is {flags!r}, and XLA ends a process for a flag that it does not know" if flags else ""
        raise RunFailed(f"a worker process exited early and stopped the run; its own message is above{hint}") from None


def launch(config: RunConfig, options: XlaConfig, signals: StopSignals, work: Callable[..., None]) -> None:
    """Start the processes that `work`, and return when they are done. In SPMD mode this process drives all devices."""
    several = os.environ.get("CPU_NUM_DEVICES", "1") != "1" or "RANK" in os.environ  # or by torchrun
    if options.spmd:
        work(0, config, options, signals)
    elif os.environ["PJRT_DEVICE"] == "CPU" and several:
        from gpt2xla.runtime.xla import cpu_replicas

        cpu_replicas.launch(work, (0, config, options, signals, True), options.mp_start_method)
    else:
        import torch_xla

        with tempfile.TemporaryDirectory(prefix="gpt2xla-") as folder:
            os.environ[REPORT_ONCE] = f"{folder}/reported"
            torch_xla.launch(work, args=(config, options, signals), start_method=options.mp_start_method)


def worker(index: int, config: RunConfig, options: XlaConfig, signals: StopSignals, is_replica: bool = False) -> None:
    """Train in this process. `index` is torch_xla's number of it; `is_replica` says that it is one of several on a CPU."""
    from gpt2xla.training.pretrain import pretrain

    runtime = runtime_class(options, is_replica)
    pretrain(config, lambda train: runtime(options, train), signals)


def runtime_class(options: XlaConfig, is_replica: bool) -> type[XlaRuntime]:
    """Return the runtime that a process trains on."""
    if options.spmd:
        from gpt2xla.runtime.xla.spmd import SpmdRuntime

        return SpmdRuntime
    if is_replica:
        from gpt2xla.runtime.xla.cpu_replicas import XlaCpuRuntime

        return XlaCpuRuntime
    from gpt2xla.runtime.xla.runtime import XlaRuntime

    return XlaRuntime
