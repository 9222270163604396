"""gpt2xla: a TPU-first PyTorch/XLA trainer for GPT-2.

Where a token goes: `data/shards.py` (disk) -> `data/windows.py` (which step reads it) -> `trainer.py` (the loop)
-> `model.py` (the loss) -> `runtime/` (gradient, reduction, update).
"""

__version__ = "0.1.0"
