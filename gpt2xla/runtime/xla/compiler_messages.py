"""Reads the messages of XLA's compiler for TPUs. Imports neither torch nor torch_xla."""

from __future__ import annotations

import re

# The memory of one device as its compiler counts it, in GiB; a little is kept for the runtime.
HBM_GIB = {"TPU v3": 15.48, "TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}

_SCALE = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def to_bytes(number: str, unit: str) -> int:
    """Return the bytes of a size such as 1.5 G, as the compiler prints it."""
    return int(float(number) * _SCALE[unit])


def compiler_figures(message: str) -> tuple[int, int] | None:
    """Return (needed, memory) in bytes, from the message with which the compiler refuses a program.

    Return None for any other message. Either the whole program needs too much, or a single array does; then the message
    has only that array's size."""
    if single := re.search(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)", message):
        return int(single[1]), int(single[2])
    if used := re.search(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm", message):
        return to_bytes(used[1], used[2]), to_bytes(used[3], used[4])
    return None
