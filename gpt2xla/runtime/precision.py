"""Decides what --mixed-precision auto means: which compute types a device likes, and which one a run takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gpt2xla.config import Precision
from gpt2xla.errors import InputError

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}
PRECISIONS = tuple(DTYPES)


class DevicePrecision(NamedTuple):
    """What a device can compute in."""

    device: str  # its name
    auto: Precision  # what --mixed-precision auto takes
    why: str  # the reason, which follows the device's name
    fastest: Precision  # what trains fastest; differs from `auto` where the user must decide
    emulates_bf16: bool = False  # whether bf16 works, but slower than fp32


class ChosenPrecision(NamedTuple):
    """What a run computes in: `name` is none, bf16 or fp16. `note` is what the summary says about the choice."""

    name: Precision
    note: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


def choose(asked: Precision, there: DevicePrecision) -> ChosenPrecision:
    """Return what a run that asks for `asked` computes in. Raise InputError for bf16 on a device that only emulates it."""
    if asked == "bf16" and there.emulates_bf16:
        raise InputError(
            f"--mixed-precision bf16: {there.device} has no bf16 and would emulate it, slower than fp32; use "
            f"--mixed-precision {there.auto}"
        )
    name = there.auto if asked == "auto" else asked
    reason = [f"auto: {there.device} {there.why}"] if asked == "auto" else []
    hint = [f"--mixed-precision {there.fastest} is usually faster here"] if name == "none" != there.fastest else []
    return ChosenPrecision(name, "; ".join(reason + hint))


def label(name: str) -> str:
    """Return what tables and summaries call a precision: fp32, bf16 or fp16."""
    return "fp32" if name == "none" else name


def of_cuda(name: str, has_bf16: bool, capability: tuple[int, int]) -> DevicePrecision:
    """Return what a GPU can compute in, by its compute capability.

    By "CUDA C++ Programming Guide", table "Throughput of Native Arithmetic Instructions": fp16 is faster than fp32 from 7.0
    on, by tensor cores, and twice as fast on 6.0 (P100). On other Pascal and Maxwell cards it is no faster."""
    if has_bf16:
        return DevicePrecision(name, "bf16", "has bf16", "bf16")
    if capability >= (7, 0) or capability == (6, 0):
        return DevicePrecision(name, "fp16", "has no bf16", "fp16", emulates_bf16=True)
    return DevicePrecision(name, "none", "has no bf16, and fp16 is no faster than fp32", "none", emulates_bf16=True)


def of_xla(kind: str, compute_capability: object) -> DevicePrecision:
    """Return what an XLA device that calls itself `kind` can compute in. `compute_capability` is a GPU's, such as "8.0".

    All TPUs multiply in bf16. XLA:CPU is fastest in fp32, even where torch is not."""
    if kind.startswith("TPU"):
        return DevicePrecision(kind, "bf16", "multiplies in bf16", "bf16")
    if compute_capability is None:
        return DevicePrecision(f"XLA:{kind.upper()}", "none", "is fastest in fp32", "none")
    major, _, minor = str(compute_capability).partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        return DevicePrecision(kind, "bf16", "is not an NVIDIA GPU", "bf16")
    return of_cuda(kind, int(major) >= 8, (int(major), int(minor)))
