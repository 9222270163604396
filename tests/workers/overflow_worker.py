"""Run by test_loss_scaling.py: a training run in fp16 whose scale begins far too high and soon grows again.

Arguments: torch or xla, then those of the runner. On XLA it prints what compile_count_worker.py does.
"""

import sys

import torch

from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, TorchConfig, XlaConfig
from gpt2xla.runtime.torch.runtime import TorchRuntime
from gpt2xla.training.pretrain import pretrain

FIRST_SCALE, GROWTH_INTERVAL = 2.0**30, 3


class HighScaler(torch.amp.GradScaler):
    def __init__(self, device: str, enabled: bool) -> None:
        super().__init__(device, FIRST_SCALE, growth_interval=GROWTH_INTERVAL, enabled=enabled)


def xla_worker(index: int, config: RunConfig, options: XlaConfig) -> None:
    import compile_count_worker

    from gpt2xla.runtime.xla import scaler as xla_scaler

    xla_scaler.INIT_SCALE, xla_scaler.GROWTH_INTERVAL = FIRST_SCALE, GROWTH_INTERVAL
    compile_count_worker.worker(index, config, options)


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        torch.amp.GradScaler = HighScaler  # type: ignore[misc]
        config, torch_options = parse_run(TorchConfig, sys.argv[2:])
        pretrain(config, lambda train: TorchRuntime(torch_options, train))
    else:
        import torch_xla

        torch_xla.launch(xla_worker, args=parse_run(XlaConfig, sys.argv[2:]))
