"""Several replicas of PyTorch/XLA on a machine without a TPU: each is a process with one XLA:CPU device.

XLA:CPU's own collectives hang between devices, so replicas exchange data through the host, by gloo. The gradients must be
there in the middle of a step. A step is therefore two graphs, micro-steps and optimizer, where a TPU has one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from tqdm import tqdm

from gpt2xla.config import TrainConfig, XlaConfig
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.optim.muon import Owners
from gpt2xla.processes.exits import REPORT_ONCE, run_and_exit
from gpt2xla.processes.quiet import silent
from gpt2xla.runtime.torch.process_group import find_place
from gpt2xla.runtime.xla.runtime import XlaRuntime

_TIMEOUT = timedelta(hours=1)  # others wait while the main process saves
_SECONDS_FOR_LAUNCHER = 10


def launch(run: Callable[..., None], arguments: tuple[Any, ...], start_method: str) -> None:
    """Call `run(*arguments)`, which makes an `XlaCpuRuntime`, in CPU_NUM_DEVICES processes; return when all are done.

    Under torchrun this process already is one of the replicas. Raises InputError if CPU_NUM_DEVICES and torchrun contradict
    each other, or variables of several processes are set without it. Raises SystemExit with the exit code of a replica that
    has failed, or was asked to stop: it has printed why, and the others are killed. Raises RunFailed if one was killed."""
    replicas = int(os.environ.get("CPU_NUM_DEVICES", "1"))
    os.environ["CPU_NUM_DEVICES"] = "1"  # each replica has one device
    if dist.is_torchelastic_launched():
        if replicas > 1:
            raise InputError(
                "CPU_NUM_DEVICES and torchrun both say how many replicas to start; leave CPU_NUM_DEVICES out"
            )
        with silent(1):
            dist.init_process_group("gloo", timeout=_TIMEOUT)
        return run(*arguments)
    if (place := find_place(os.environ)) and place.world_size > 1:
        raise InputError(
            f"WORLD_SIZE={place.world_size}: start replicas on CPUs with torchrun or CPU_NUM_DEVICES={place.world_size}, "
            "and unset RANK and WORLD_SIZE"
        )
    context: Any = multiprocessing.get_context(start_method)
    with tempfile.TemporaryDirectory(prefix="gpt2xla-") as folder:
        # Replicas find each other through a file: a port chosen here could be taken by the time they listen on it.
        meeting = Path(folder) / "replicas"
        processes = [
            context.Process(target=_replica, args=(rank, replicas, meeting, run, arguments)) for rank in range(replicas)
        ]
        try:
            for process in processes:
                process.start()
            _wait_for_all(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()


def _wait_for_all(processes: list[Any]) -> None:
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        for sentinel in connection.wait(list(running)):
            rank = running.pop(sentinel)
            processes[rank].join()
            code = processes[rank].exitcode
            if code in (-signal.SIGTERM, -signal.SIGINT):  # before it trained
                raise SystemExit(128 - code)
            if code < 0:
                cause = f"{signal.Signals(-code).name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
                raise RunFailed(
                    f"replica {rank} was ended by {cause}, which stopped the run; rerun the same command to resume"
                )
            if code > 0:
                raise SystemExit(code)


def _replica(rank: int, replicas: int, meeting: Path, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    # tqdm's default lock is a multiprocessing semaphore, which warns at exit if the replica was killed.
    tqdm.set_lock(threading.RLock())
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ[REPORT_ONCE] = str(meeting.with_name("reported"))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the others are on this machine, whatever its name resolves to
    meeting_place = f"file://{meeting}"
    with silent(1):
        dist.init_process_group("gloo", init_method=meeting_place, rank=rank, world_size=replicas, timeout=_TIMEOUT)
    run_and_exit(lambda: run(*arguments))


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(1)


class XlaCpuRuntime(XlaRuntime):
    """Implements `base.Runtime` for one replica: one XLA:CPU device, and a gloo process group with the others."""

    averages = False

    def __init__(self, options: XlaConfig, config: TrainConfig) -> None:
        if options.ddp:
            raise InputError("--ddp reduces gradients on the devices, which hangs between CPU replicas; leave it out")
        super().__init__(options, config)

    def _count(self) -> tuple[int, int, int]:
        return dist.get_rank(), dist.get_world_size(), dist.get_world_size()

    def _owners(self) -> Owners:
        return Owners()  # each replica does all of it: XLA:CPU's collectives hang

    def _layout(self) -> str:
        return f", joined by gloo{super()._layout()}"

    def place_parameters(self, model: nn.Module) -> None:
        with _others_may_leave():
            for parameter in model.parameters():
                dist.broadcast(parameter.detach(), src=0)
        super().place_parameters(model)

    def _reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with self.watch.not_tracing():
            # Execute all micro-steps and their loss: reading single tensors would compute what they share once for each.
            torch_xla.sync()
            gradients = torch_xla._XLAC._xla_get_cpu_tensors([p.grad for p in parameters])
            flat = _sum_over_replicas(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = flat.split([p.numel() for p in parameters])
            reduced = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
            for parameter, gradient in zip(parameters, xm.send_cpu_data_to_device(reduced, self.device), strict=True):
                parameter.grad = gradient

    def sum(self, value: Tensor) -> Tensor:
        with self.watch.not_tracing():
            return self.to_device(_sum_over_replicas(value.cpu()))

    def gather_rows(self, values: Tensor) -> Tensor:
        with self.watch.not_tracing():
            on_host = torch.zeros(self.world_size, len(values))
            on_host[self.rank] = values.cpu()
            return self.to_device(_sum_over_replicas(on_host).flatten())

    def _sum_on_host(self, values: Tensor) -> Tensor:
        return _sum_over_replicas(values)

    def barrier(self, name: str) -> None:
        _sum_over_replicas(torch.zeros(1))

    def close(self) -> None:
        self.barrier("closed")  # the launcher ends all as soon as one of them exits with another code than 0
        super().close()


def _sum_over_replicas(on_host: Tensor) -> Tensor:
    with _others_may_leave():
        dist.all_reduce(on_host)
    return on_host


@contextlib.contextmanager
def _others_may_leave() -> Iterator[None]:
    """Wait when a collective breaks: another replica has printed why, and the launcher is about to kill this one."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(_SECONDS_FOR_LAUNCHER)
        raise RunFailed(f"the other replicas do not answer ({error})") from None
