"""Several processes of torchrun on one model: whole on each (DistributedDataParallel), with Adam's state split (--zero1), or
with weights, gradients and Adam's state split (--fsdp).

ZeRO stage 1 and 3 of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from gpt2xla.config import OptimConfig, TorchConfig
from gpt2xla.errors import InputError
from gpt2xla.model.gpt2 import GPT2

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def check_options(options: TorchConfig, *, distributed: bool) -> None:
    """Raises InputError for what cannot work."""
    if options.zero1 and options.fsdp:
        raise InputError("--zero1 and --fsdp: --fsdp splits Adam's state, too; leave --zero1 out")
    for name, asked in (("--zero1", options.zero1), ("--fsdp", options.fsdp)):
        if asked and not distributed:
            raise InputError(f"{name} needs several processes; start them with torchrun, or leave it out")


def check_optimizer(options: TorchConfig, config: OptimConfig) -> None:
    """Raises InputError where an update needs whole matrices, and processes have parts."""
    for name, asked in (("--zero1", options.zero1), ("--fsdp", options.fsdp)):
        if asked and config.optim_type == "muon":
            raise InputError(
                f"{name} does not work with --optim-type muon, whose updates need whole matrices; leave it out"
            )


def describe(options: TorchConfig) -> str:
    """What is split, for the summary at start."""
    if options.fsdp:
        return ", weights and optimizer split"
    return ", optimizer split" if options.zero1 else ""


def wrap_in_ddp(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """`model`, whose gradients are averaged over processes in the backward pass, outside of no_sync()."""
    device_ids = [device] if device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, static_graph=True)
    # DDP regroups gradients after its first backward pass, and groups decide the order of summation. Done here, all steps
    # sum alike, also the first one after a resume, which an unbroken run took as a later one. With static_graph the first
    # pass must also be one that reduces, which the first micro-step of several is not.
    _warm_up(ddp, device)
    return ddp


def shard_fully(model: GPT2, mesh: DeviceMesh, device: torch.device) -> GPT2:
    """Split every parameter of `model`, which is on the host, along its first dimension over the devices of `mesh`. Blocks
    are gathered where they compute; embeddings and final layer norm, the root's own, from forward to backward.

    Parameters stay fp32, and autocast rounds them where it does so in DDP: FSDP's own mixed precision would also run layer
    norms and the residual stream in 16 bits.
    """
    from torch.distributed.fsdp import fully_shard  # takes a third of a second

    for part in (*model.h, model):
        fully_shard(part, mesh=mesh)
        if device.type == "cpu":  # gloo in torch 2.8 gives the sum where it is asked for the mean
            cast("FSDPModule", part).set_force_sum_reduction_for_comms(True)
    # The root must be the first to run, and an evaluation may come before training; it calls the root's methods alone.
    _warm_up(model, device)
    return model


def _warm_up(model: nn.Module, device: torch.device) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for _ in range(2):
        model(ids, ids)[0].backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def accumulated(model: nn.Module, *, sync: bool) -> Iterator[None]:
    """Around a micro-step: gradients are reduced with `sync` alone, and kept whole until then."""
    if hasattr(model, "set_requires_gradient_sync"):
        cast("FSDPModule", model).set_requires_gradient_sync(sync)
    if isinstance(model, DistributedDataParallel) and not sync:
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, parameters that belong to no block can be read, whichever method of the model is called. Collective."""
    sharded = cast("FSDPModule", model)
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


def split(whole: Tensor, mesh: DeviceMesh, device: torch.device) -> Tensor:
    """A host tensor as `shard_fully` lays out a parameter of its shape; a single number is whole everywhere."""
    from torch.distributed.tensor import DTensor, Shard

    if whole.dim() == 0:
        return whole.to(device)
    parts, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
    own = (parts[rank] if rank < len(parts) else whole[:0]).to(device, copy=True)
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def joined(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split. Collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def split_optimizer(
    optimizer_class: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **arguments: Any
) -> torch.optim.Optimizer:
    """Each process updates some parameters, of which alone it has `state`, and sends them to the others."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes half a second

    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class, parameters_as_bucket_view=True, **arguments)
    optimizer.state = optimizer.optim.state
    return optimizer


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The one that computes: of `split_optimizer`'s the one within, which has this process's parameters."""
    return getattr(optimizer, "optim", optimizer)


def collect(held: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What all processes hold, each under other names, on the main one's host; nothing on others. Collective."""
    places: list[dict[str, torch.Size]] = [{}] * dist.get_world_size()
    dist.all_gather_object(places, {name: tensor.shape for name, tensor in held.items()})
    collected = {}
    for owner, shapes in enumerate(places):
        for name, shape in shapes.items():
            tensor = held[name] if owner == dist.get_rank() else torch.empty(shape, device=device)
            dist.broadcast(tensor, src=owner)
            if dist.get_rank() == 0:
                collected[name] = tensor.to("cpu", copy=True)
    return collected
