"""Run by test_spmd.py in its own process: a training run in SPMD mode that counts graphs and bytes per device.

Prints one JSON object. Arguments: those of run_pretrain_xla.py.
"""

import json
import sys
from collections import Counter
from typing import Any

import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs

from gpt2xla.cli import parse_run
from gpt2xla.config import XlaConfig
from gpt2xla.optim.state import MOMENTS
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
    print(json.dumps({"compiles": compiles, "whole": whole, "on_device": list(on_device.values())}))


if __name__ == "__main__":
    main()
