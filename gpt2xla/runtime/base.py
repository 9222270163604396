"""The seam between the trainer and the devices it runs on, and what both runtimes share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gpt2xla.config import OptimConfig
from gpt2xla.data.windows import Batch
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.precision import ChosenPrecision

P = ParamSpec("P")
T = TypeVar("T")
GIB = 2**30


class Shortage(NamedTuple):
    """Memory that has run out.

    Attributes:
        place: where, in words.
        memory: bytes that there are for one program; None if unknown.
        needed: bytes that the refused program takes beside its arguments; None where it broke off on its way.
        state_split: over how many devices weights, gradients and the optimizer's state are divided.
    """

    place: str
    memory: int | None = None
    needed: int | None = None
    state_split: int = 1


class Runtime(Protocol):
    """One process's view of the devices. Methods marked *collective* are called by all processes alike.

    Attributes:
        device: where this process's model lives.
        rank: which data-feeding process this is, from 0.
        world_size: how many there are.
        devices: how many devices all of them have together; a batch is split evenly over these.
        is_main: whether this is the one process that prints, logs and writes.
        description: the devices in words, for the summary at start.
        precision: what the model computes in, --mixed-precision auto decided.
    """

    device: torch.device
    rank: int
    world_size: int
    devices: int
    is_main: bool
    description: str
    precision: ChosenPrecision

    def seed(self, seed: int, step: int) -> None:
        """Seed random numbers, dropout's among them, for one step: by seed, step and process, so that a resumed run needs
        no stored generator state."""
        ...

    def setup_model(self, model: GPT2) -> nn.Module:
        """Choose how `model` computes (`kernels.py`), move it to the device and return what forwards in training; build the
        optimizer after this. Collective."""
        ...

    def build_optimizer(
        self, model: nn.Module, config: OptimConfig, saved: dict[str, Any] | None
    ) -> torch.optim.Optimizer:
        """The device's best Adam or AdamW, with state: zeros, or `saved` as `optim.export_state` gave it."""
        ...

    def device_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches on the device, the next one on its way while the device works on this one."""
        ...

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        """`step` as one unit of device work: on XLA one graph, compiled by the first call, which says so on the console by
        `name`, and executed once per call."""
        ...

    def part(self, name: str) -> AbstractContextManager[None]:
        """Around what is done between steps now and then, such as saving. Where programs are compiled, one that is compiled
        when a part is gone through again, or a step is called again, is a warning that names it and the cause."""
        ...

    def trace_ms(self) -> float | None:
        """Asked inside a step: milliseconds of host time since it began, which went into tracing it and waiting for data;
        None where steps are not traced."""
        ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def accumulate(self, model: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        """Around forward and backward, both, of a micro-step; only with `sync` may gradients be reduced over processes."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this process's summand of the loss of all; `optimizer_step` adds up the processes'."""
        ...

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None: ...

    def optimizer_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, *, max_grad_norm: float
    ) -> tuple[Tensor, Tensor]:
        """Reduce, unscale, clip, step, zero: one method, so that the order cannot be wrong. Where loss or gradient is not
        finite on any process, no process updates anything. Collective.

        Returns:
            `loss` added up over processes, and the norm of the gradient before clipping.
        """
        ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, on the device. Collective."""
        ...

    def flag(self, value: bool) -> Tensor:
        """1.0 or 0.0 on the device, as data: what `sum` makes into the number of processes with a True."""
        ...

    def gather_rows(self, values: Tensor) -> Tensor:
        """What the processes hold of `values`, 1-d and of one length, side by side in the order of ranks, for each to read
        whole. Called inside a compiled step. Collective."""
        ...

    def gather(self, value: float) -> list[float]:
        """Every process's value (in float64, so integers up to 2^53 are exact), by rank, on the host. Collective; makes the
        host wait for the other processes."""
        ...

    def when_ready(self, callback: Callable[..., None], values: Tensor) -> None:
        """Call `callback(*values)`, the 1-d tensor's values as floats, once the device has them; the loop does not wait.

        Called inside a compiled step. Callbacks run one at a time, in order; what one raises is raised by a later call
        here or by `wait`.
        """
        ...

    def wait(self, behind: int = 0) -> None:
        """Return when every callback has run, but perhaps those of the last `behind` calls of `when_ready`."""
        ...

    def to_device(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device, as data: never as a constant of a compiled program."""
        ...

    def to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies on the CPU for the main process; none for the others. Collective."""
        ...

    def save_shards(self, state: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, dict[str, Tensor]]:
        """Write `state`, which may be split over devices, to `folder` part by part (`sharded_state`) and return nothing; or
        write nothing and return it as `to_host` does. Collective."""
        ...

    def barrier(self, name: str) -> None:
        """Return when every process has come here. Collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the runtime itself must carry over a resume, such as a gradient scaler: plain values only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def ended_ranks(self) -> list[int]:
        """Which other processes are known to have ended."""
        ...

    def compiles(self) -> int:
        """Device programs compiled by this process so far; 0 where nothing is compiled."""
        ...

    def peak_flops(self) -> float | None:
        """Peak floating-point operations per second of all devices together; None if unknown. Of a CPU it is measured in the
        run's precision, of others it is the published bf16 (or fp16) rate, whatever the run's precision."""
        ...

    def shortage(self, error: Exception) -> Shortage | None:
        """What `error` tells of memory that has run out; None if it tells of something else."""
        ...

    def has_memory_for(self, work: Callable[[], None]) -> bool | None:
        """Do `work`, in which no other process takes part, to see whether there is memory for it; None, with nothing done,
        where that would compile it."""
        ...

    def free_memory(self) -> int | None:
        """Bytes that this process may still use, where using more may end it without an error; None elsewhere."""
        ...

    def close(self) -> None: ...


def random_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def set_matmul_precision(precision: str) -> None:
    """torch.set_float32_matmul_precision, without the warning that torch 2.9 prints about its own implementation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.set_float32_matmul_precision(precision)


def prefetch(batches: Iterable[Batch], to_device: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """`to_device` of each batch, one ahead of the caller, in a thread; an error in it is raised here."""
    source = iter(batches)

    def next_batch() -> Batch | None:
        batch = next(source, None)
        return None if batch is None else to_device(batch)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
        pending = thread.submit(next_batch)
        while (batch := pending.result()) is not None:
            pending = thread.submit(next_batch)
            yield batch
