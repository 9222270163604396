#!/usr/bin/env python
"""Pre-train GPT-2 with plain PyTorch: `python run_pretrain.py ...`, or several GPUs through `torchrun`."""

from gpt2xla.commands.train import main
from gpt2xla.processes.exits import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
