"""How much memory this machine, or the container around this process, has left, and how this process keeps its own."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
# Files with a control group's limit and what it uses, and the line of memory.stat that counts what it has read of files,
# which is let go of where memory runs short: cgroups version 2, then 1.
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes; None where the operating system does not tell. By the least of what the machine has available and the limits
    of the control groups around this process."""
    free = [*_of_machine(root), *_of_groups(root)]
    return min(free) if free else None


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for what is asked for next, where it is glibc. It gives large pieces back to the
    system, which hands each one out again page by page, all zeroed: on CPUs that takes up to half of a training step.

    Not where the process's address space is limited, of which pieces too small for what comes next would take a part."""
    if sys.platform != "linux":
        return
    import resource  # which Windows does not have

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    no_piece_of_its_own, never_shrink = (-4, 0), (-1, -1)  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(*no_piece_of_its_own)
        mallopt(*never_shrink)


def _of_machine(root: Path) -> list[int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _of_groups(root: Path) -> list[int]:
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    free = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers in _FILES or "memory" in controllers.split(","):
            version = _FILES["memory" if controllers else ""]
            top = root / str(_CGROUPS / ("memory" if controllers else "")).lstrip("/")
            # In a container the path may be the host's, and the container's own group stands at the top.
            for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
                free += _of_group(folder, version)
                if folder == top:
                    break
    return free


def _of_group(folder: Path, version: tuple[str, str, str]) -> list[int]:
    limit, usage, cache = version
    try:
        allowed, used = ((folder / name).read_text().strip() for name in (limit, usage))
        if allowed == "max":
            return []
        lines = (folder / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == cache)
        return [max(0, int(allowed) - int(used) + cached)]
    except (OSError, ValueError, IndexError):
        return []
