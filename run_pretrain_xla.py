#!/usr/bin/env python
"""Pre-train GPT-2 on TPUs through PyTorch/XLA: `PJRT_DEVICE=TPU python run_pretrain_xla.py ...`.

`PJRT_DEVICE=CPU` takes the same path on any machine, `CPU_NUM_DEVICES=2` with two replicas.
"""

from gpt2xla.commands.train_xla import main
from gpt2xla.processes.exits import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
