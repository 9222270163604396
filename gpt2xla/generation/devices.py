"""Finds the device that text is generated on, moves a model there, and chooses how the device is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from torch import nn

from gpt2xla.config import Precision
from gpt2xla.errors import InputError
from gpt2xla.generation.cuda_graphs import CudaDevice
from gpt2xla.generation.decoding import READING_OF_A_TOKEN
from gpt2xla.generation.packed_linear import pack_linears
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.precision import DTYPES, of_cuda
from gpt2xla.runtime.xla.environment import importing_torch_xla


def move(model: GPT2, name: str, precision: Precision) -> Device:
    """Move `model` to a device, laid out as it generates fastest there, and return the device.

    Args:
        name: auto, cpu, cuda, mps or xla, as --device says.
        precision: as --mixed-precision says; the type of the weights and of all that is computed from them.

    Raises InputError if there is no such device."""
    if name == "xla":
        with importing_torch_xla():
            from gpt2xla.runtime.xla.device import XlaDevice
        device: OneDevice = XlaDevice()
    else:
        device = _torch_device(name)
    model.to(DTYPES[_chosen(device.device) if precision == "auto" else precision])
    device.setup_model(model)
    if device.device.type == "cpu" and (reason := pack_linears(model)):
        print(f"note: generating with torch's own matrix products, half as fast: {reason}", file=sys.stderr)
    return for_generation(device, model, lambda note: print(note, file=sys.stderr))


def for_generation(device: Device, model: GPT2, tell: Callable[[str], None]) -> Device:
    """Return `device`, where `model` is already, as it generates fastest. `tell` is given what the user should know."""
    if device.device.type != "cuda":
        return device
    # Weights that are split over processes (FSDP) are gathered for each step, at another place each time.
    is_whole = type(model.wte.weight) is nn.Parameter
    return CudaDevice(device, [READING_OF_A_TOKEN] if is_whole else [], tell)


def _chosen(device: torch.device) -> Precision:
    """Return what auto means: the type in which the device is trained by default."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return of_cuda("", has_bf16, torch.cuda.get_device_capability(device)).auto
    return "bf16" if device.type == "xla" and os.environ.get("PJRT_DEVICE") == "TPU" else "none"


def _torch_device(name: str) -> OneDevice:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise InputError(f"--device {name}: torch finds none here; use --device auto")
    return OneDevice(torch.device(name))
