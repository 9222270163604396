"""Checks the environment that torch_xla reads while it is imported, and fixes what notebook hosts set wrongly.

Imports no torch_xla. Devices are counted by what the kernel and the drivers list, which occupies no device: otherwise worker
processes could not have it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from gpt2xla.errors import InputError
from gpt2xla.logs.console import say
from gpt2xla.runtime.xla import compiler_flags

# Each of torch_xla's processes chooses these for itself, unless they are set. Set for a whole machine, they make every
# process believe that it is the same one ("Expected 4 worker addresses, got 1").
SET_FOR_ONE_PROCESS = ("TPU_PROCESS_ADDRESSES", "CLOUD_TPU_TASK_ID")

# Notebook hosts that set those two for the kernel's own process, by a variable that only that host has.
NOTEBOOK_HOSTS = {"KAGGLE_KERNEL_RUN_TYPE": "Kaggle", "COLAB_RELEASE_TAG": "Colab"}

# PCI vendor (Google's) and device ids of TPU chips, and what their devices call themselves. The vendor also makes network
# cards. v2 and v3 have one device id; their subsystem ids, as Google's tpu-info knows them, are 0x004e and 0x004f.
_TPU_VENDOR = "0x1ae0"
_TPU_DEVICES = {
    "0x0027": "TPU v3", "0x005e": "TPU v4", "0x0062": "TPU v5", "0x0063": "TPU v5 lite", "0x006f": "TPU v6 lite",
    "0x0076": "TPU7x",
}  # fmt: skip
_TPU_V2 = "0x004e"

CUDA_PLUGIN = "jax_plugins.xla_cuda12"


def prepare(environment: MutableMapping[str, str], *, fsdp: bool = False) -> None:
    """Make `environment` one in which torch_xla starts; call it before the import.

    On Kaggle and Colab two variables are removed. The TPU's compiler gets our flags (`compiler_flags.py`): those for
    --fsdp, too, if it is given. PJRT_DEVICE=CUDA becomes GPU, our name of JAX's CUDA plugin (`cuda_plugin.py`): torch_xla
    2.9 aborts on its own name for it. Raises InputError if PJRT_DEVICE is missing or unknown, or names devices that do not
    exist."""
    device = environment.get("PJRT_DEVICE")
    if not device:
        raise InputError("PJRT_DEVICE is not set; put PJRT_DEVICE=TPU (or CPU) in front of the command")
    if device not in ("TPU", "CPU", "CUDA", "GPU"):
        raise InputError(f"PJRT_DEVICE={device}: unknown; choose TPU, CPU or CUDA")
    if device == "TPU":
        chips = tpu_chips()
        if not chips:
            raise InputError("PJRT_DEVICE=TPU: this machine has no TPU; choose a TPU machine, or PJRT_DEVICE=CPU")
        if too_late := compiler_flags.add_to(environment, chips[0], fsdp=fsdp):
            say(f"warning: {too_late}", error=True)
    replicas = environment.get("CPU_NUM_DEVICES", "1")
    if device == "CPU" and not (replicas.isdecimal() and int(replicas) >= 1):
        raise InputError(f"CPU_NUM_DEVICES={replicas}: give the number of replicas to start, such as 2")
    if device in ("CUDA", "GPU"):
        if not _is_installed(CUDA_PLUGIN):
            raise InputError(
                f"PJRT_DEVICE={device}: JAX's CUDA plugin is missing; pip install -r requirements-xla_cuda.txt, or train "
                "with run_pretrain.py, which needs none"
            )
        found, asked = gpus(environment), environment.get("GPU_NUM_DEVICES")
        if found == 0:
            raise InputError(f"PJRT_DEVICE={device}: no NVIDIA driver or no GPU here; choose PJRT_DEVICE=CPU or TPU")
        if asked and not (asked.isdecimal() and 1 <= int(asked) <= found):
            raise InputError(
                f"GPU_NUM_DEVICES={asked}: there are {found} GPUs here; choose 1 to {found}, or leave it out"
            )
        environment["PJRT_DEVICE"] = "GPU"
    if notebook_host(environment):
        for name in SET_FOR_ONE_PROCESS:
            environment.pop(name, None)


@contextlib.contextmanager
def importing_torch_xla() -> Iterator[None]:
    """Turn an ImportError inside the block, which imports torch_xla, into an InputError."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"torch_xla is missing or broken ({error}); pip install -r requirements-xla_tpu.txt") from None


def notebook_host(environment: Mapping[str, str]) -> str | None:
    """Return Kaggle, Colab, or None elsewhere."""
    return next((name for variable, name in NOTEBOOK_HOSTS.items() if variable in environment), None)


def tpu_chips(devices: Path = Path("/sys/bus/pci/devices")) -> list[str]:
    """Return what the devices of each TPU chip of this host, 0 to 8 of them, call themselves, such as "TPU v5 lite"."""

    def reads(file: Path) -> str:
        return file.read_text().strip() if file.exists() else ""

    def kind(device: Path) -> str | None:
        found = _TPU_DEVICES.get(reads(device / "device")) if reads(device / "vendor") == _TPU_VENDOR else None
        return "TPU v2" if found == "TPU v3" and reads(device / "subsystem_device") == _TPU_V2 else found

    return [found for device in sorted(devices.glob("*")) if (found := kind(device))]


def gpus(environment: Mapping[str, str]) -> int:
    """Return how many NVIDIA GPUs CUDA would see, less those that CUDA_VISIBLE_DEVICES hides. NVML counts without CUDA."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:  # no driver
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return 0
    return shown(count.value, environment.get("CUDA_VISIBLE_DEVICES"))


def shown(devices: int, visible: str | None) -> int:
    """Return how many of `devices` GPUs CUDA_VISIBLE_DEVICES leaves: those it lists before the first -1 or empty entry."""
    if visible is None:
        return devices
    entries = [entry.strip() for entry in visible.split(",")]
    return min(devices, next((i for i, entry in enumerate(entries) if entry in ("", "-1")), len(entries)))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its parent
        return False
