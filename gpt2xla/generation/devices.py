"""Finds the device that text is generated on, and moves a model there."""

from __future__ import annotations

import sys

import torch

from gpt2xla.errors import InputError
from gpt2xla.generation.packed_linear import pack_linears
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.xla.environment import importing_torch_xla


def move(model: GPT2, name: str, dtype: str) -> Device:
    """Move `model` to a device, laid out as it generates fastest there, and return the device.

    Args:
        name: auto, cpu, cuda, mps or xla, as --device says.
        dtype: fp32 or bf16: the type of the weights and of all that is computed from them.

    Raises InputError if there is no such device."""
    if dtype == "bf16":
        model.to(torch.bfloat16)
    if name == "xla":
        with importing_torch_xla():
            from gpt2xla.runtime.xla.device import XlaDevice
        device: OneDevice = XlaDevice()
    else:
        device = _torch_device(name)
    device.setup_model(model)
    if device.device.type == "cpu" and (reason := pack_linears(model)):
        print(f"note: generating with torch's own matrix products, half as fast: {reason}", file=sys.stderr)
    return device


def _torch_device(name: str) -> OneDevice:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise InputError(f"--device {name}: torch finds none here; use --device auto")
    return OneDevice(torch.device(name))
