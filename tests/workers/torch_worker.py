"""Run by test_torch_parallel.py under torchrun: a training run whose processes count what they reduce and what they hold.

Arguments: a folder for RANK.json, then those of run_pretrain.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig
from gpt2xla.optim.state import ADAM_MOMENTS
from gpt2xla.processes.exits import run_and_exit
from gpt2xla.runtime.torch.runtime import TorchRuntime
from gpt2xla.training.pretrain import pretrain
from gpt2xla.training.train_step import TrainStep

reduced: list[int] = []  # elements of each reduction of gradients
updates: list[list[int]] = []  # the same by update


def count_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    reduced.append(bucket.buffer().numel())
    return allreduce_hook(None, bucket)


def main() -> None:
    config, options = parse_run(TorchConfig, sys.argv[2:])
    steps: list[TrainStep] = []
    original_init, original_call = TrainStep.__init__, TrainStep.__call__
    # FSDP calls the former from torch 2.14 on.
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    reduce_scatter = getattr(dist, name)

    def kept(self: TrainStep, *args: Any) -> None:
        original_init(self, *args)
        steps.append(self)
        if isinstance(self.parallel_model, DistributedDataParallel):
            self.parallel_model.register_comm_hook(None, count_bucket)

    def counted(self: TrainStep, *args: Any) -> tuple[Tensor, Tensor, float]:
        reduced.clear()
        results = original_call(self, *args)
        updates.append(list(reduced))
        return results

    def count_reduce_scatter(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(input.numel())
        return reduce_scatter(output, input, *args, **kwargs)

    TrainStep.__init__, TrainStep.__call__ = kept, counted  # type: ignore[method-assign]
    setattr(dist, name, count_reduce_scatter)
    pretrain(config, lambda train: TorchRuntime(options, train))
    (step,) = steps
    states = [state[key] for state in step.optimizer.state.values() for key in ADAM_MOMENTS]
    counts = {
        "updates": updates,
        "moments": sum(map(numel_here, states)),
        "weights": sum(map(numel_here, step.model.parameters())),
    }
    (Path(sys.argv[1]) / f"{step.runtime.rank}.json").write_text(json.dumps(counts))


def numel_here(tensor: Tensor) -> int:
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


if __name__ == "__main__":
    run_and_exit(main)
