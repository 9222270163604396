"""Tells how much memory this machine or container has left, and makes this process keep memory that it frees."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# The files with a control group's limit and usage, and the line of memory.stat that counts cached files, which the kernel
# drops when memory runs short: cgroups version 2, then 1.
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes left, or None if the operating system does not say.

    That is the least of what the machine has available and what the control groups around this process allow."""
    available = [line for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    return min([*(int(line.split()[1]) * 1024 for line in available), *_of_groups(root)], default=None)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later requests.

    By default it gives large pieces back to the system, which hands them out again page by page, zeroed: on CPUs that takes
    up to half of a training step. If the process's address space is limited, nothing is changed: pieces too small for later
    requests would use up part of it."""
    if sys.platform != "linux":
        return
    import resource  # which Windows does not have

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    no_own_mapping, never_shrink = (-4, 0), (-1, -1)  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(*no_own_mapping)
        mallopt(*never_shrink)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _of_groups(root: Path) -> list[int]:
    free = []
    for group in _lines(root / "proc/self/cgroup"):
        _, controllers, path = group.split(":", 2)
        if controllers in _FILES or "memory" in controllers.split(","):
            version = _FILES["memory" if controllers else ""]
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            # In a container the path may be the host's, while the container's own group is at the top.
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
