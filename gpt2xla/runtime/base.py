"""The seam between the program and the devices it runs on: one protocol for each kind of client.

`one_device.OneDevice` is the plainest runtime; reading it is reading the contract. The others inherit it.
Methods marked *collective* are called by all processes alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gpt2xla.config import OptimConfig, TrainConfig
from gpt2xla.config.batch import MICRO_BATCH
from gpt2xla.data.windows import Batch
from gpt2xla.errors import is_out_of_memory
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.precision import ChosenPrecision
from gpt2xla.runtime.trial import Trial

P = ParamSpec("P")
T = TypeVar("T")
GIB = 2**30


class Shortage(NamedTuple):
    """Memory that has run out."""

    place: str  # where, in words
    memory: int | None = None  # bytes that one program may use; None if unknown
    # bytes that the refused program takes besides its arguments; None if it failed while running
    needed: int | None = None
    state_split: int = 1  # over how many devices weights, gradients and the optimizer's state are divided


class Memory:
    """What a runtime knows about its devices' memory. This one knows only errors of the host's memory."""

    def shortage(self, error: Exception) -> Shortage | None:
        """Return what `error` says about memory that has run out, or None if it is another error."""
        return Shortage("this machine") if is_out_of_memory(error) else None

    def has_room_for(self, work: Callable[[], None]) -> bool | None:
        """Do `work`, in which no other process takes part, and return whether memory was enough for it.

        Return None, and do nothing, where that would compile `work` or is otherwise impossible."""
        return None

    def free(self) -> int | None:
        """Return the bytes still free, where using more would kill the process without an error; elsewhere None."""
        return None

    def most_that_fit(self, trial: Trial) -> int:
        """Return the largest share of `trial` that fits, as far as this process can tell. Collective.

        Where nothing is known, that is what fits common devices: 32 sequences over all of them."""
        return trial.at_most(MICRO_BATCH // trial.devices)

    def remembered(self, trial: Trial) -> int | None:
        """Return the share that an earlier run found to fit, if it left a note."""
        return None

    def remember(self, trial: Trial, share: int) -> None:
        """Leave a note for later runs, where finding out again would take long."""


class CompileWatch:
    """Knows what is compiled when. This one is for runtimes that compile nothing."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Wrap what is done between steps now and then, such as saving. A compile in a later pass prints a warning."""
        return nullcontext()

    def trace_ms(self) -> float | None:
        """Return, inside a step, the milliseconds of tracing and waiting for data so far; None where nothing is traced."""
        return None

    def programs(self) -> int:
        """Return how many device programs this process has compiled so far."""
        return 0


class Device(Protocol):
    """Where a model lives and how work reaches it: all that generation needs."""

    device: torch.device
    # Cached attention looks at a multiple of so many slots. More than one where each other number costs time.
    slots_at_once: int

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a host tensor on the device, as data: never as a constant of a compiled program."""

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        """Return `step` as one unit of device work.

        On XLA it is one graph, executed once per call. The first call compiles it, which the console shows by `name`."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which products compute in the run's precision."""


class Processes(Protocol):
    """The processes of a run: all that evaluations and endings need."""

    rank: int  # the index of this data-feeding process, from 0
    world_size: int  # the number of such processes
    devices: int  # how many devices all of them have together; a batch is split evenly over these
    is_main: bool  # whether this is the one process that prints, logs and writes
    description: str  # the devices in words, for the summary at start

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all processes, on the device. Collective."""

    def flag(self, value: bool) -> Tensor:
        """Return 1.0 or 0.0 on the device, as data. `sum(flag(x))` counts the processes whose x is true."""

    def gather_rows(self, values: Tensor) -> Tensor:
        """Return all processes' `values` (1-d, of one length), in the order of ranks, as one tensor that each can read.

        Called inside a compiled step. Collective."""

    def gather(self, value: float) -> list[float]:
        """Return every process's value, by rank, on the host; the host waits for the other processes. Collective.

        Values travel in float64, so integers up to 2^53 are exact."""

    def barrier(self, name: str) -> None:
        """Return when every process has called this. Collective."""

    def ended_ranks(self) -> list[int]:
        """Return the other processes that are known to have exited."""

    def close(self) -> None:
        """Release threads and connections at the end of a run."""


class Runtime(Device, Processes, Protocol):
    """One process's view of the devices it trains on."""

    precision: ChosenPrecision  # what the model computes in, after --mixed-precision auto is decided
    train: TrainConfig  # by which `setup_model` chooses kernels; replaced once --train-batch-size auto is decided
    # How many steps late the host may wait for a step's values, so that the device does not run out of work.
    steps_behind: int

    @property
    def memory(self) -> Memory: ...

    @property
    def watch(self) -> CompileWatch: ...

    def seed(self, seed: int, step: int) -> None:
        """Seed all random numbers of one step, dropout's included, by seed, step and process.

        A resumed run therefore needs no stored generator state."""

    def setup_model(self, model: GPT2, evaluated_tokens: int | None = None) -> nn.Module:
        """Choose how `model` computes (`kernels.py`), move it to the device and return the module to train. Collective.

        `evaluated_tokens` is how many tokens will be evaluated, on all devices together, where nothing is trained: a runtime
        that may compile decides by the work ahead."""

    def build_optimizer(
        self, model: nn.Module, config: OptimConfig, saved: dict[str, Any] | None
    ) -> torch.optim.Optimizer:
        """Return the device's best optimizer for --optim-type, with its state from the start. Call `setup_model` first.

        `saved` is the training state that `snapshot` returned on any runtime; the runtime takes its own state from it, too.
        None starts from zeros."""

    def number(self, value: float) -> Tensor:
        """Return `value`, the same on all processes, as fp32 (0-d) on the device, as data. The host does not wait."""

    def device_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches on the device; the next one is copied while the device works on this one."""

    def accumulate(self, model: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        """Wrap forward and backward of a micro-step; gradients may be reduced over processes only with `sync`."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this process's share of the whole loss. Collective.

        Once `optimizer_step` returns, it is summed over processes."""

    def optimizer_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, *, rate: float, max_grad_norm: float
    ) -> tuple[Tensor, Tensor]:
        """Reduce, unscale, clip, update, zero: one method, so that the order cannot be wrong. Collective.

        If the loss or the gradient is not finite on any process, no process updates anything. A `max_grad_norm` of 0 clips
        nothing. Return `loss` summed over processes, and the gradient's norm before clipping."""

    def when_ready(self, callback: Callable[..., None], values: Tensor) -> None:
        """Call `callback(*values)`, the 1-d tensor's values as floats, once the device has them; the loop does not wait.

        Called inside a compiled step. Callbacks run one at a time, in order. What one raises is raised by a later call
        of this method or of `wait`."""

    def wait(self, behind: int = 0) -> None:
        """Return when every callback has run, except perhaps those of the last `behind` calls of `when_ready`."""

    def snapshot(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copy weights and training state to the host, after all work on the device is done. Collective.

        Return, on the main process, whole weights by parameter name, and {"optimizer": state by parameter name, "runtime":
        the runtime's own}, as plain values; empty dictionaries on the others. A runtime whose moments are split over
        devices may write them to `folder` in parts instead (`sharded_state`), unless that is None: hosts without a shared
        disk have no such folder."""

    def peak_flops(self) -> float | None:
        """Return the peak floating-point operations per second of all devices together; None if unknown.

        A CPU's rate is measured in the run's precision; other devices' is the published one in bf16 (or fp16)."""
