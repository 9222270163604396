"""The plainest runtime: one process on one device that torch can use directly. The other runtimes inherit it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2xla.config import OptimConfig, TrainConfig
from gpt2xla.data.windows import Batch
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.muon import Owners
from gpt2xla.optim.optimizer import ADAM_EPS, build_optimizer, clip_gradients
from gpt2xla.optim.state import MOMENTS, export_state, init_state
from gpt2xla.runtime.base import CompileWatch, Memory, P, Runtime, T
from gpt2xla.runtime.precision import ChosenPrecision

FP32 = ChosenPrecision("none")


class OneDevice:
    """Implements `base.Runtime` for one process. With several, its collectives fail until a subclass overrides them."""

    slots_at_once = 1

    def __init__(
        self, device: torch.device, precision: ChosenPrecision = FP32, rank: int = 0, world_size: int = 1
    ) -> None:
        self.device, self.precision, self.description, self.train = device, precision, str(device), TrainConfig()
        self.rank, self.world_size, self.devices = rank, world_size, world_size
        self.steps_behind = 0
        self.is_main = rank == 0
        self.random_rank = rank  # the rank that goes into the seed
        self.memory, self.watch = Memory(), CompileWatch()
        self.scaler: Any = None  # torch.amp.GradScaler, or the same on XLA; None where gradients stay in range
        self.stack_bytes = 0  # of matrices that Muon updates together on a device
        self.owners = Owners()  # of those matrices
        self.state_options: dict[str, Any] = {"count_on_device": False}  # of `init_state`, for this runtime's Adam

    # Device

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        return step

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = self.precision.dtype
        return torch.autocast(self.device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()

    # Processes

    def sum(self, value: Tensor) -> Tensor:
        assert self.world_size == 1
        return value

    def flag(self, value: bool) -> Tensor:
        return self.number(float(value))

    def gather_rows(self, values: Tensor) -> Tensor:
        assert self.world_size == 1
        return values

    def gather(self, value: float) -> list[float]:
        if self.world_size == 1:
            return [value]
        values = torch.zeros(self.world_size, dtype=torch.float64)
        values[self.rank] = value
        return self._sum_on_host(values).tolist()

    def barrier(self, name: str) -> None:
        assert self.world_size == 1

    def ended_ranks(self) -> list[int]:
        return []

    def close(self) -> None:
        pass

    # Runtime

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(self._seed_of(seed, step))

    def setup_model(self, model: GPT2, evaluated_tokens: int | None = None) -> nn.Module:
        return model.to(self.device)

    def build_optimizer(
        self, model: nn.Module, config: OptimConfig, saved: dict[str, Any] | None
    ) -> torch.optim.Optimizer:
        optimizer = build_optimizer(
            model, config, self.precision.dtype, self._adam(config), self.stack_bytes, self.owners
        )
        state = saved["optimizer"] if saved else None
        init_state(model, config, optimizer, state, self._place_state, self._zeros, **self.state_options)
        if self.scaler and saved and "scaler" in saved["runtime"]:
            self.scaler.load_state_dict(saved["runtime"]["scaler"])
        return optimizer

    def number(self, value: float) -> Tensor:
        # A kernel's argument: a copy would wait for the device.
        return torch.full((), value, dtype=torch.float32, device=self.device)

    def device_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return prefetch(batches, self._send)

    def accumulate(self, model: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def optimizer_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, *, rate: float, max_grad_norm: float
    ) -> tuple[Tensor, Tensor]:
        self._set_rate(optimizer, rate)
        self._reduce_gradients(optimizer)
        loss = self.sum(loss)
        if self.scaler:
            self.scaler.unscale_(optimizer)
        grad_norm = clip_gradients(model, max_grad_norm)
        self._update(optimizer, loss, grad_norm)
        optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def when_ready(self, callback: Callable[..., None], values: Tensor) -> None:
        callback(*values.tolist())

    def wait(self, behind: int = 0) -> None:
        pass

    def snapshot(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.wait()
        state = export_state(model, optimizer)
        weights = self._to_host(model.state_dict())
        moments = self._moments({key: state[key] for key in MOMENTS if key in state}, folder)
        updates = self._to_host({"step": state["step"]})
        self.barrier("the snapshot is complete")
        if not self.is_main:
            return {}, {}
        own = {"scaler": self.scaler.state_dict()} if self.scaler else {}
        return weights, {"optimizer": {"step": int(updates["step"].item()), **moments}, "runtime": own}

    def peak_flops(self) -> float | None:
        return None

    # The parts of the above that devices do differently

    def _sum_on_host(self, values: Tensor) -> Tensor:
        assert self.world_size == 1
        return values

    def _send(self, batch: Batch) -> Batch:
        return Batch(*map(self.to_device, batch))

    def _seed_of(self, seed: int, step: int) -> int:
        return int(np.random.SeedSequence([seed, step, self.random_rank]).generate_state(1)[0])

    def _adam(self, config: OptimConfig) -> Callable[..., torch.optim.Optimizer]:
        return adam(config)

    def _place_state(self, tensor: Tensor) -> Tensor:
        return self.to_device(tensor)

    def _zeros(self, parameter: Tensor) -> Tensor:
        return self._place_state(torch.zeros(parameter.shape))

    def _set_rate(self, optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    def _reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Sum the gradients over processes, unless the backward pass did."""
        assert self.world_size == 1

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> None:
        if torch.isfinite(loss) & torch.isfinite(grad_norm):
            optimizer.step()

    def _to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whole copies on the CPU to the main process; others may get nothing. Collective."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def _moments(self, moments: dict[str, dict[str, Tensor]], folder: Path | None) -> dict[str, dict[str, Tensor]]:
        """Return the optimizer's moments as `_to_host` does, or write them to `folder` and return nothing. Collective."""
        return {key: self._to_host(part) for key, part in moments.items()}


_is_a_runtime: Callable[[torch.device], Runtime] = OneDevice  # which mypy checks


def adam(config: OptimConfig, library: Any = torch.optim, **options: Any) -> partial[torch.optim.Optimizer]:
    """Return what makes `library`'s Adam or AdamW, as --optim-type says, of parameter groups."""
    adam_class = library.Adam if config.optim_type == "adam" else library.AdamW
    return partial(adam_class, lr=config.learning_rate, betas=config.betas, eps=ADAM_EPS, **options)


def set_matmul_precision(precision: str) -> None:
    """Call torch.set_float32_matmul_precision without the warning that torch 2.9 prints about its own implementation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.set_float32_matmul_precision(precision)


def prefetch(batches: Iterable[Batch], to_device: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """Yield `to_device(batch)` of each batch, computed in a thread one batch ahead. Its errors are raised here."""
    source = iter(batches)

    def next_batch() -> Batch | None:
        batch = next(source, None)
        return None if batch is None else to_device(batch)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
        pending = thread.submit(next_batch)
        while (batch := pending.result()) is not None:
            pending = thread.submit(next_batch)
            yield batch
