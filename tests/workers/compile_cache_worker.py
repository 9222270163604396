"""Run by test_compile_count.py in a process of its own: a training run on a CPU that opens the compile cache as a TPU does.

Arguments: those of run_pretrain_xla.py.
"""

import sys

import torch_xla
import torch_xla.runtime as xr

from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, XlaConfig
from gpt2xla.runtime.xla import compiles as xla_compiles
from gpt2xla.runtime.xla import device as xla_device
from gpt2xla.runtime.xla.runtime import XlaRuntime
from gpt2xla.training.pretrain import pretrain


def worker(index: int, config: RunConfig, options: XlaConfig) -> None:
    def open_compile_cache(folder: str) -> None:
        device_type, xr.device_type = xr.device_type, lambda: "TPU"
        xla_compiles.open_compile_cache(folder)
        xr.device_type = device_type

    xla_device.open_compile_cache = open_compile_cache
    pretrain(config, lambda train: XlaRuntime(options, train))


if __name__ == "__main__":
    torch_xla.launch(worker, args=parse_run(XlaConfig, sys.argv[1:]))
