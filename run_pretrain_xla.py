#!/usr/bin/env python
"""Pre-train GPT-2 on TPUs through PyTorch/XLA: `PJRT_DEVICE=TPU python run_pretrain_xla.py ...`.

`PJRT_DEVICE=CPU` takes the same path on any machine, `CPU_NUM_DEVICES=2` with two replicas.
"""

import os
import sys
from concurrent.futures.process import BrokenProcessPool

from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, XlaConfig
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.exits import exit_code


def main() -> None:
    config, options = parse_run(XlaConfig)
    device = os.environ.get("PJRT_DEVICE")
    if not device:
        raise InputError("PJRT_DEVICE is not set; put PJRT_DEVICE=TPU (or CPU) in front of the command")
    if device == "CUDA":  # torch_xla aborts on it
        raise InputError("PJRT_DEVICE=CUDA: torch_xla 2.9 has no CUDA build; on GPUs use run_pretrain.py")
    try:
        import torch_xla
    except ImportError as error:
        raise InputError(f"torch_xla is missing or broken ({error}); pip install -r requirements-xla_tpu.txt") from None

    if device == "CPU" and (os.environ.get("CPU_NUM_DEVICES", "1") != "1" or "RANK" in os.environ):  # or by torchrun
        from gpt2xla.runtime import xla_cpu

        return xla_cpu.launch(replica, (config, options), options.mp_start_method)

    try:
        # Nothing may touch a device before this: the workers could not have it then.
        torch_xla.launch(worker, args=(config, options), start_method=options.mp_start_method)
    except BrokenProcessPool:
        raise RunFailed("a worker process ended early, and with it the run; its own message stands above") from None


def worker(index: int, config: RunConfig, options: XlaConfig) -> None:
    from gpt2xla.runtime.xla import XlaRuntime
    from gpt2xla.trainer import pretrain

    pretrain(config, lambda train: XlaRuntime(options, train))


def replica(config: RunConfig, options: XlaConfig) -> None:
    from gpt2xla.runtime.xla_cpu import XlaCpuRuntime
    from gpt2xla.trainer import pretrain

    pretrain(config, lambda train: XlaCpuRuntime(options, train))


if __name__ == "__main__":
    sys.exit(exit_code(main))
