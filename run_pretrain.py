#!/usr/bin/env python
"""Pre-train GPT-2 with plain PyTorch: `python run_pretrain.py ...`, or several GPUs through `torchrun`."""

import sys

from gpt2xla.commands.train import main
from gpt2xla.processes.exits import exit_code, exit_now_on_signal

if __name__ == "__main__":
    sys.exit(exit_now_on_signal(exit_code(main)))
