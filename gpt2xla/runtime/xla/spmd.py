"""PyTorch/XLA in SPMD mode: one process per host traces the program of all devices.

XLA's partitioner (GSPMD, Xu et al. 2021) divides it over them and adds the communication. Batches are split over
their first dimension. Weights, gradients and Adam's state are whole on every device or, with --fsdp, split as
`split_dimension` says; `fsdp.py` gathers weights where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_env_vars as xenv
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.distributed.xla_backend  # registers xla://
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla._internal import tpu
from torch_xla.experimental.distributed_checkpoint import SPMDSavePlanner

from gpt2xla.config import TrainConfig, XlaConfig
from gpt2xla.data.windows import Batch
from gpt2xla.errors import InputError
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.muon import Owners
from gpt2xla.processes.quiet import silent
from gpt2xla.runtime import sharded_state
from gpt2xla.runtime.xla.fsdp import WholeWeights
from gpt2xla.runtime.xla.layout import mark
from gpt2xla.runtime.xla.memory import XlaMemory
from gpt2xla.runtime.xla.owners import SpmdOwners
from gpt2xla.runtime.xla.runtime import XlaRuntime

_AXIS = "devices"


def split_dimension(shape: Sequence[int], devices: int) -> int | None:
    """Return which dimension of a tensor --fsdp splits over the devices; None if the tensor is whole everywhere.

    It is the first dimension that divides evenly: parts of rows lie one after the other in the whole tensor, parts of
    columns do not. A stack of matrices is split as each of them. Biases and layer norms stay whole, as they are not worth
    sending."""
    if devices == 1 or len(shape) < 2:
        return None
    rows_and_columns = range(len(shape) - 2, len(shape))
    return next((dimension for dimension in rows_and_columns if shape[dimension] % devices == 0), None)


def _kind_of_host() -> str:
    """Return what the devices would call themselves, by the type of this host, such as v5litepod-8; "TPU" if unknown."""
    try:
        name = str(tpu.get_tpu_env()[xenv.ACCELERATOR_TYPE]).split("-")[0]
    except (OSError, KeyError, ValueError):
        return "TPU"
    kinds = {"v5litepod": "TPU v5 lite", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    return kinds.get(name, f"TPU {name}")


class SpmdRuntime(XlaRuntime):
    """Implements `base.Runtime` for one host's process; `rank` and `world_size` count hosts."""

    averages = False

    def __init__(self, options: XlaConfig, config: TrainConfig) -> None:
        if options.ddp:
            raise InputError("--ddp reduces gradients between processes; under --spmd XLA does it: leave --ddp out")
        xr.use_spmd()  # before anything touches a device
        count = xr.global_runtime_device_count()
        self.mesh = xs.Mesh(np.arange(count), (count,), (_AXIS,))
        super().__init__(options, config)
        self.random_rank = 0  # all hosts trace one program, which draws for the whole batch
        if options.fsdp:
            self.memory = XlaMemory(self.device_kind, options, state_split=count)
        if self.world_size > 1:
            with silent(1):
                dist.init_process_group("gloo", init_method="xla://")

    def _count(self) -> tuple[int, int, int]:
        return xr.process_index(), xr.process_count(), xr.global_runtime_device_count()

    def _owners(self) -> Owners:
        return SpmdOwners(self.devices, self._place, self._split_rows) if self.devices > 1 else Owners()

    def _layout(self) -> str:
        sharded = ", weights and optimizer sharded" if self.options.fsdp else ""
        return f" (torch_xla {torch_xla.__version__}, SPMD{sharded})"

    def place_parameters(self, model: nn.Module) -> None:
        model._apply(self.to_device)
        for parameter in model.parameters():
            parameter.register_hook(self._place)
        for module in model.modules():
            module.register_forward_hook(self._split_output)
        if self.options.fsdp and self.devices > 1:
            assert isinstance(model, GPT2)
            again = self.train.activation_checkpointing == "none"  # otherwise blocks run forward again, and gather then
            WholeWeights(model, self._place, self._whole, xm.optimization_barrier_, again=again)

    @property
    def device_kind(self) -> str:
        # SPMD mode has one virtual device, whose kind torch_xla cannot tell; the host's environment can.
        return _kind_of_host() if xr.device_type() == "TPU" else "cpu"

    def _send(self, batch: Batch) -> Batch:
        # With several hosts, each one's batch is its part of the whole.
        by_rows = xs.ShardingSpec(self.mesh, (_AXIS, None), minibatch=self.world_size > 1)
        return Batch(*xm.send_cpu_data_to_device(list(batch), self.device, by_rows))

    def _reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        pass  # they are already those of the whole batch

    def sum(self, value: Tensor) -> Tensor:
        return value

    def flag(self, value: bool) -> Tensor:
        # Split, so that each host's devices hold its own value: a whole tensor would have to be the same everywhere.
        devices = xr.addressable_runtime_device_count()
        flags = torch.full((devices,), float(value) / devices)
        spec = xs.ShardingSpec(self.mesh, (_AXIS,), minibatch=self.world_size > 1)
        return xm.send_cpu_data_to_device([flags], self.device, spec)[0].sum()

    def gather_rows(self, values: Tensor) -> Tensor:
        # Whole on every device: reading a split tensor would compile another program.
        return self._whole(values)

    def _sum_on_host(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self, name: str) -> None:
        if self.world_size > 1:
            dist.barrier()

    def to_device(self, tensor: Tensor) -> Tensor:
        spec = xs.ShardingSpec(self.mesh, self._placement(tensor.shape))
        return xm.send_cpu_data_to_device([tensor.detach()], self.device, spec)[0]

    def _to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # Reading a split tensor as if it were whole would compile a program for each shape.
        split = {name: self._gather_parts(t) for name, t in tensors.items() if _AXIS in self._placement(t.shape)}
        whole = super()._to_host({name: tensor for name, tensor in tensors.items() if name not in split})
        return {name: split[name] if name in split else whole[name] for name in tensors} if self.is_main else {}

    def _moments(self, moments: dict[str, dict[str, Tensor]], folder: Path | None) -> dict[str, dict[str, Tensor]]:
        # In parts only where all hosts write to one folder.
        if not self.options.fsdp or folder is None:
            return super()._moments(moments, folder)
        devices = xr.addressable_runtime_device_count()
        sharded_state.save(folder, moments, SPMDSavePlanner(), devices=devices, distributed=self.world_size > 1)
        return {}

    def _gather_parts(self, tensor: Tensor) -> Tensor:
        """Return the whole tensor on the main process's host; on others an empty one of its shape. Collective."""
        parts = [(part.indices, part.data) for part in xs.XLAShardedTensor(tensor.detach()).local_shards]
        if self.world_size > 1:
            by_host: list[Any] = [None] * self.world_size
            dist.gather_object(parts, by_host if self.is_main else None)
            parts = [part for host in by_host for part in host or []]
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for indices, data in parts:
            whole[tuple(indices)] = data
        return whole

    def _placement(self, shape: Sequence[int]) -> tuple[str | None, ...]:
        split = split_dimension(shape, self.devices) if self.options.fsdp else None
        return tuple(_AXIS if dimension == split else None for dimension in range(len(shape)))

    def _split_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep activations, and their gradients, in the batch's layout.

        Under --fsdp the partitioner would otherwise follow the weights' layout, and send activations, not weights."""
        if isinstance(output, Tensor) and output.dim() == 3:
            self._split_rows(output)
            if output.requires_grad:
                output.register_hook(self._split_rows)

    def _split_rows(self, tensor: Tensor) -> Tensor:
        return mark(tensor, self.mesh, (_AXIS, *[None] * (tensor.dim() - 1)))

    def _whole(self, tensor: Tensor) -> Tensor:
        return mark(tensor, self.mesh, (None,) * tensor.dim())

    def _place(self, gradient: Tensor) -> Tensor:
        return mark(gradient, self.mesh, self._placement(gradient.shape))
