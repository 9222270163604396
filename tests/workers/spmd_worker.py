"""Run by test_spmd.py in its own process: a training run in SPMD mode that counts graphs and bytes per device.

Prints one JSON object. Arguments: those of run_pretrain_xla.py.
"""

import json
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs

from gpt2xla.cli import parse_run
from gpt2xla.config import XlaConfig
from gpt2xla.optim.muon import Stack
from gpt2xla.optim.state import MOMENTS
from gpt2xla.runtime.xla import owners as owned
from gpt2xla.runtime.xla.owners import ReplicaOwners
from gpt2xla.runtime.xla.spmd import SpmdRuntime
from gpt2xla.training.pretrain import pretrain
from gpt2xla.training.train_step import TrainStep


def main() -> None:
    config, options = parse_run(XlaConfig, sys.argv[1:])
    steps: list[TrainStep] = []
    original = TrainStep.__init__

    def kept(self: TrainStep, *args: Any) -> None:
        original(self, *args)
        steps.append(self)

    TrainStep.__init__ = kept  # type: ignore[method-assign]
    pretrain(config, lambda train: SpmdRuntime(options, train))
    compiles = met.metric_data("CompileTime")[0]

    whole, on_device = 0, Counter[str]()
    for parameter in steps[0].model.parameters():
        state = steps[0].optimizer.state[parameter]
        for tensor in (parameter.detach(), *(state[key] for key in MOMENTS if key in state)):
            whole += tensor.numel() * 4
            for shard in xs.XLAShardedTensor(tensor).local_shards:
                on_device[shard.shard_device] += shard.data.numel() * 4
    shared = replicas_share_a_stack()
    print(json.dumps({"compiles": compiles, "whole": whole, "on_device": list(on_device.values()), "shared": shared}))


def replicas_share_a_stack() -> list[int]:
    """Return how many of five matrices each of three replicas gets, after checking that each result returns to its place.

    Without devices, whose all-gather hangs on CPUs: here it returns what all three would have sent."""
    matrices = [torch.full((2, 3), float(number)) for number in range(5)]
    stack = Stack({}, matrices, 0)
    replicas = [ReplicaOwners(torch.tensor([rank]), 3) for rank in range(3)]
    parts = [owners.collect(matrices, stack) for owners in replicas]
    owned.xm = SimpleNamespace(all_gather=lambda own, **_: torch.cat([part + 10 for part in parts]))  # type: ignore[assignment]
    for owners, part in zip(replicas, parts, strict=True):
        results = owners.distribute(part + 10, stack)
        assert [result.unique().item() for result in results] == [10.0, 11.0, 12.0, 13.0, 14.0]
    return [len(part) for part in parts]


if __name__ == "__main__":
    main()
