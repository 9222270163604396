"""Tells on any machine whether a training step fits a TPU, and what the TPU's own compiler makes of it.

PyTorch/XLA traces the step on a CPU, with the collectives of all replicas in it, and libtpu compiles it ahead of time.
`check.py` asks; `traced_step.py` and `compile.py` answer, each in its own process."""
