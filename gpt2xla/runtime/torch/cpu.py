"""What makes torch fast on a CPU: how it multiplies fp32 matrices, and how many cores each process uses."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gpt2xla.runtime.one_device import set_matmul_precision


def choose_products(precision: str) -> None:
    """Set --matmul-precision, and have oneDNN compute "highest" too where it is as exact.

    On AMD's processors MKL, torch's choice for fp32, takes twice as long. On processors without matrix units for bf16,
    oneDNN computes in fp32 whatever it is allowed."""
    set_matmul_precision("medium" if precision == "highest" else precision)
    if precision == "highest" and not _is_exact():
        set_matmul_precision(precision)


def _is_exact() -> bool:
    """Tell whether a product is within fp32's own rounding. In bf16 it would be a thousand times as far off."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = a.double() @ b.double()
    return bool((a @ b - expected).norm() / expected.norm() < 1e-6)


def share_cores() -> None:
    """Let torch use this process's part of the host's cores, unless the user has set OMP_NUM_THREADS.

    torchrun's own choice is one thread for each of several processes, whatever the host."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1 and _torchrun_chose():
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, allowed // processes))


def _torchrun_chose() -> bool:
    """Tell whether OMP_NUM_THREADS is torchrun's choice rather than the user's."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    # torchrun sets the variable in its own environment before it starts us. The kernel shows only the environment that
    # torchrun was started with. Without Linux's /proc the two look alike; torchrun's users expect all cores to work.
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in started_with.split(b"\0"))
