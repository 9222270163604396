"""Will a training step fit a TPU, and what does the TPU's own compiler make of it? Answered on any machine.

The step is traced by PyTorch/XLA on a CPU, with the collectives of all replicas in it, and compiled by libtpu ahead of time.
`check.py` asks, `compile.py` and `runtime/xla_trace.py` answer, each in a process of its own.
"""
