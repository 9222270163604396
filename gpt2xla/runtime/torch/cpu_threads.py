"""How many cores a process computes on where torchrun starts several on one host."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def share_cores() -> None:
    """Have torch use this process's part of the host's cores, unless the user has set OMP_NUM_THREADS: torchrun's own choice
    is one thread for each of several processes, whatever the host."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1 and _torchrun_chose():
        torch.set_num_threads(max(1, _cores() // processes))


def count_threads(processes: int) -> str:
    """For the summary at start, of one of `processes`."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}{' each' if processes > 1 else ''}"


def _torchrun_chose() -> bool:
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    # torchrun sets the variable in its own environment before it starts us. What it was itself started with is all that the
    # kernel shows of it. Without Linux's /proc the two look alike, and who uses torchrun expects all cores to work.
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in started_with.split(b"\0"))


def _cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
