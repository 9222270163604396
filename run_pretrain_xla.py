#!/usr/bin/env python
"""Pre-train GPT-2 on TPUs through PyTorch/XLA: `PJRT_DEVICE=TPU python run_pretrain_xla.py ...`.

`PJRT_DEVICE=CPU` takes the same path on any machine, `CPU_NUM_DEVICES=2` with two replicas.
"""

import sys

from gpt2xla.commands.train_xla import main
from gpt2xla.processes.exits import exit_code, exit_now_on_signal

if __name__ == "__main__":
    sys.exit(exit_now_on_signal(exit_code(main)))
