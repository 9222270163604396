"""Which compute type a device likes, and which one a run takes: what --mixed-precision auto means."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gpt2xla.config import Precision
from gpt2xla.errors import InputError

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}
PRECISIONS = tuple(DTYPES)


class DevicePrecision(NamedTuple):
    """What a device can do.

    Attributes:
        device: what it is called.
        auto: what --mixed-precision auto takes.
        why: the reason, which follows the device's name.
        fastest: what trains fastest; another word than `auto` where that is the user's to decide.
        emulates_bf16: whether bf16 works, but slower than fp32.
    """

    device: str
    auto: Precision
    why: str
    fastest: Precision
    emulates_bf16: bool = False


class ChosenPrecision(NamedTuple):
    """What a run computes in: `name` is none, bf16 or fp16. `note` is what the summary says of the choice."""

    name: Precision
    note: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


def choose(asked: Precision, there: DevicePrecision) -> ChosenPrecision:
    """Raises InputError for bf16 on a device that only emulates it."""
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
    """As tables and summaries call it: fp32, bf16 or fp16."""
    return "fp32" if name == "none" else name


def of_torch(device: torch.device) -> DevicePrecision:
    """Asks CUDA's current device, if `device` is one."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # also on all of AMD's
        return of_cuda(name, has_bf16, torch.cuda.get_device_capability(device))
    if device.type == "mps":
        return DevicePrecision("MPS", "none", "is trained in fp32", "none")
    # torch computes with these through oneDNN; other CPUs widen bf16 to fp32 first.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return DevicePrecision("a CPU", "none", "is trained in fp32", "bf16" if has_bf16 else "none")


def of_cuda(name: str, has_bf16: bool, capability: tuple[int, int]) -> DevicePrecision:
    """By "CUDA C++ Programming Guide", table "Throughput of Native Arithmetic Instructions": fp16 is faster than fp32 from
    7.0 on, by tensor cores, and on 6.0 (P100), twice as fast; on other cards of Pascal and Maxwell it is no faster."""
    if has_bf16:
        return DevicePrecision(name, "bf16", "has bf16", "bf16")
    if capability >= (7, 0) or capability == (6, 0):
        return DevicePrecision(name, "fp16", "has no bf16", "fp16", emulates_bf16=True)
    return DevicePrecision(name, "none", "has no bf16, and fp16 is no faster than fp32", "none", emulates_bf16=True)


def of_xla(kind: str, compute_capability: object) -> DevicePrecision:
    """By what an XLA device calls itself, and what its plugin says of it if it is a GPU, such as "8.0". All TPUs multiply in
    bf16; XLA:CPU is fastest in fp32, also where torch is not."""
    if kind.startswith("TPU"):
        return DevicePrecision(kind, "bf16", "multiplies in bf16", "bf16")
    if compute_capability is None:
        return DevicePrecision(f"XLA:{kind.upper()}", "none", "is fastest in fp32", "none")
    major, _, minor = str(compute_capability).partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        return DevicePrecision(kind, "bf16", "is no GPU of NVIDIA's", "bf16")
    return of_cuda(kind, int(major) >= 8, (int(major), int(minor)))
