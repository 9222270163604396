"""Several processes of torchrun on one model, in one of three layouts.

Either each process holds the whole model (DistributedDataParallel), or Adam's state is split (--zero1), or weights,
gradients and Adam's state are split (--fsdp). The latter two are ZeRO stages 1 and 3 of
Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from gpt2xla.config import TorchConfig
from gpt2xla.errors import InputError
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.torch.accelerators import Accelerator

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def check_options(options: TorchConfig, *, distributed: bool) -> None:
    """Raise InputError for options that cannot work together or here."""
    if options.zero1 and options.fsdp:
        raise InputError("--zero1 and --fsdp: --fsdp splits Adam's state, too; leave --zero1 out")
    for name, asked in (("--zero1", options.zero1), ("--fsdp", options.fsdp)):
        if asked and not distributed:
            raise InputError(f"{name} needs several processes; start them with torchrun, or leave it out")


def check_backend(options: TorchConfig, backend: str, accelerator: Accelerator) -> None:
    """Raise InputError for a backend that cannot split weights on the device."""
    if options.fsdp and backend != accelerator.backend:
        raise InputError(f"--fsdp needs {accelerator.backend} here; leave --ddp-backend {backend} out")


def describe(options: TorchConfig) -> str:
    """Return what is split, for the summary at start."""
    if options.fsdp:
        return ", weights and optimizer split"
    return ", optimizer split" if options.zero1 else ""


def wrap_in_ddp(model: nn.Module, accelerator: Accelerator, dtype: torch.dtype) -> DistributedDataParallel:
    """Return `model` with gradients that are averaged over processes in the backward pass, outside of no_sync()."""
    ddp = DistributedDataParallel(
        model, device_ids=accelerator.ddp_ids, gradient_as_bucket_view=True, static_graph=True
    )
    # DDP regroups gradients after its first backward pass, and the groups decide the order of summation. After this warm-up
    # all steps sum in the same order, so that the first step after a resume equals the same step of an unbroken run.
    # static_graph also requires that the first pass reduces, which the first of several micro-steps does not.
    _warm_up(ddp, accelerator, dtype)
    return ddp


def shard_fully(model: GPT2, mesh: DeviceMesh, accelerator: Accelerator, dtype: torch.dtype) -> GPT2:
    """Split every parameter of `model`, which is on the host, along its first dimension over the devices of `mesh`.

    A block's matrices are gathered where it computes, forward and backward. All else, embeddings, layer norms and biases,
    belongs to the root, and stays gathered from forward to backward: it is little beside activations, and the next block
    may add a block's last bias. Parameters are fp32; matrices are sent in `dtype`, the run's compute type, to which
    autocast, under which all calls of `model` must be made, rounds them anyway. Gradients are summed in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a third of a second

    # Without `cast_forward_inputs` it would also round the residual stream.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    matrices = {parameter for parameter in model.h.parameters() if parameter.dim() == 2}
    # The root comes first: it would not look into blocks that are split already, for their layer norms and biases.
    fully_shard(model, mesh=mesh, ignored_params=matrices)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(block.parameters()) - matrices)
    if not accelerator.averages:
        for part in (model, *model.h):
            cast("FSDPModule", part).set_force_sum_reduction_for_comms(True)
    # The root must run first, and an evaluation, which calls only methods of the root, may come before training.
    _warm_up(model, accelerator, dtype)
    return model


def _warm_up(model: nn.Module, accelerator: Accelerator, dtype: torch.dtype) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=accelerator.device)
    for _ in range(2):
        with torch.autocast(accelerator.kind, dtype, enabled=dtype != torch.float32):
            loss, _ = model(ids, ids)
        loss.backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def accumulated(model: nn.Module, *, sync: bool) -> Iterator[None]:
    """Wrap a micro-step. Gradients are reduced only with `sync`, and are kept whole until then."""
    if hasattr(model, "set_requires_gradient_sync"):
        cast("FSDPModule", model).set_requires_gradient_sync(sync)
    if isinstance(model, DistributedDataParallel) and not sync:
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather the parameters that belong to no block, so that any method of the model may be called inside. Collective."""
    sharded = cast("FSDPModule", model)
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


def split(whole: Tensor, mesh: DeviceMesh, device: torch.device) -> Tensor:
    """Return a host tensor in the layout that `shard_fully` gives a parameter of its shape; numbers are whole everywhere."""
    from torch.distributed.tensor import DTensor, Shard

    if whole.dim() == 0:
        return whole.to(device)
    parts, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
    own = (parts[rank] if rank < len(parts) else whole[:0]).to(device, copy=True)
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def joined(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be split. Collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def split_optimizer(adam: partial[torch.optim.Optimizer], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return `adam(groups)`, of which each process updates some parameters and sends them to the others.

    A process has `state` only of the parameters that it updates."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes half a second

    optimizer = ZeroRedundancyOptimizer(groups, adam.func, parameters_as_bucket_view=True, **adam.keywords)  # type: ignore[arg-type]
    optimizer.state = optimizer.optim.state
    return optimizer


def collect(held: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Return what all processes hold, each under other names, on the main one's host; nothing on others. Collective."""
    places: list[dict[str, torch.Size]] = [{}] * dist.get_world_size()
    dist.all_gather_object(places, {name: tensor.shape for name, tensor in held.items()})
    collected = {}
    for owner, shapes in enumerate(places):
        for name, shape in shapes.items():
            tensor = held[name] if owner == dist.get_rank() else torch.empty(shape, device=accelerator.device)
            dist.broadcast(tensor, src=owner)
            if dist.get_rank() == 0:
                collected[name] = accelerator.to_host(tensor)
    return collected
