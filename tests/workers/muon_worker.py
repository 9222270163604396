"""Run by test_muon.py under torchrun: training runs with Muon, one after the other, in each layout of torchrun's processes.

Arguments: a folder for LAYOUT/ and RANK.json, then those of run_pretrain.py. The latter holds how many numbers of momentum
this process kept in each layout, and how far the weights were off from one process's in `largest_difference`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig
from gpt2xla.optim.muon import Muon, Owners
from gpt2xla.processes.exits import run_and_exit
from gpt2xla.runtime.torch import process_group
from gpt2xla.runtime.torch.owners import ProcessOwners, RowOwners
from gpt2xla.runtime.torch.parallel import joined, split
from gpt2xla.runtime.torch.runtime import TorchRuntime
from gpt2xla.training.pretrain import pretrain
from gpt2xla.training.train_step import TrainStep

LAYOUTS: dict[str, list[str]] = {"ddp": [], "zero1": ["--zero1"], "fsdp": ["--fsdp"]}


def main() -> None:
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    steps: list[TrainStep] = []
    original = TrainStep.__init__

    def kept(self: TrainStep, *args: Any) -> None:
        original(self, *args)
        steps.append(self)

    TrainStep.__init__ = kept  # type: ignore[method-assign]
    report: dict[str, Any] = {}
    meet = process_group._meet
    for name, layout in LAYOUTS.items():
        # Gloo's addresses of the run before lie in the same store: without a prefix, a process may try these, and wait.
        process_group._meet = lambda announce, name=name: dist.PrefixStore(name, meet(announce))
        config, options = parse_run(TorchConfig, [*flags, *layout, "--checkpoints-dir", str(folder / name)])
        pretrain(config, lambda train, options=options: TorchRuntime(options, train))  # type: ignore[misc]
        states = steps[-1].optimizer.state.values()
        report[name] = sum(numel_here(state["momentum_buffer"]) for state in states if "momentum_buffer" in state)
    dist.init_process_group("gloo")
    report["largest_difference"] = largest_difference()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def numel_here(tensor: Tensor) -> int:
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def largest_difference() -> float:
    """Of three updates of odd numbers of matrices with odd numbers of rows, one by one and in stacks."""
    mesh, cpu = init_device_mesh("cpu", (dist.get_world_size(),)), torch.device("cpu")
    place = dist.get_rank(), dist.get_world_size(), cpu
    alone = updated(Owners(), Tensor.clone, 0)
    found = 0.0
    for stack_bytes in (0, 2**20):
        for owners, wrap in (
            (ProcessOwners(*place), Tensor.clone),
            (RowOwners(*place), lambda tensor: split(tensor, mesh, cpu)),
        ):
            shared = updated(owners, wrap, stack_bytes)
            found = max(found, *((a - b).abs().max().item() for a, b in zip(alone, shared, strict=True)))
    return found


def updated(owners: Owners, wrap: Callable[[Tensor], Tensor], stack_bytes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(15, 5), (15, 5), (15, 5), (5, 5), (7, 5), (7, 5), (7, 5), (1, 9)]
    parameters = [nn.Parameter(wrap(torch.randn(shape, generator=generator))) for shape in shapes]
    groups = [
        {"params": part, "blocks": blocks, "weight_decay": 0.1}
        for part, blocks in ((parameters[:3], 3), (parameters[3:], 1))
    ]
    optimizer = Muon(groups, torch.optim.AdamW([torch.zeros(1)]), 0.01, torch.float32, stack_bytes, owners)
    for parameter in optimizer.with_state().intersection(parameters):
        optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    for _ in range(3):
        for parameter, shape in zip(parameters, shapes, strict=True):
            parameter.grad = wrap(torch.randn(shape, generator=generator))
        optimizer.step()
    return [joined(parameter.detach()) for parameter in parameters]


if __name__ == "__main__":
    run_and_exit(main)
