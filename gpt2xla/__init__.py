"""gpt2xla: a TPU-first PyTorch/XLA trainer for GPT-2.

Read in this order: `training/trainer.py` (the loop) -> `training/train_step.py` (one update) -> `model/gpt2.py` (the loss)
-> `runtime/base.py` (what a device must do) -> `data/windows.py` (which tokens a step reads).
"""

__version__ = "0.1.0"
