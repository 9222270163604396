"""The C shim `shim.c`, built and loaded into this very program: calls of the C library that fail when told to."""

from __future__ import annotations


def load() -> None:
    pass
