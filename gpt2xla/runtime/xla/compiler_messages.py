"""Reads the messages of XLA's compiler for TPUs."""

from __future__ import annotations

import re

_SCALE = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def compiler_figures(message: str) -> tuple[int, int] | None:
    """(needed, memory) in bytes, from the message with which XLA's compiler for TPUs refuses a program; None if it is
    another one. It has two ways: the whole program needs too much, or a single array does, which is all it then tells.
    """
    if single := re.search(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)", message):
        return int(single[1]), int(single[2])
    if used := re.search(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm", message):
        return int(float(used[1]) * _SCALE[used[2]]), int(float(used[3]) * _SCALE[used[4]])
    return None
