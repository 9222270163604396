"""`python -m gpt2xla.doctor`: shows what is installed and which devices answer, and finds known problems, with their fixes.
With `--bucket URL` it examines a bucket instead.

Exits with 0 if it finds no problem, and with 1 otherwise. The doctor itself takes no device: another process tries the
runtime, so the doctor can run in a notebook before the launch."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gpt2xla import __version__
from gpt2xla.checkpoint.bucket.examination import CHECKPOINT_BYTES, examine
from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.config.paths import is_url
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.processes.exits import exit_code
from gpt2xla.runtime.torch.host_memory import free_host_memory
from gpt2xla.runtime.xla import compiler_flags
from gpt2xla.runtime.xla.environment import SET_FOR_ONE_PROCESS, gpus, notebook_host, prepare, tpu_chips
from gpt2xla.runtime.xla.versions import NEWEST, install, installed, misfits, release_for, why_no_kernels

PACKAGES = (
    "torch", "torch_xla", "libtpu", "jax", "jaxlib", "jax-cuda12-pjrt", "transformers", "numpy", "tensorflow",
    "tensorflow-tpu", "libtpu-nightly",
)  # fmt: skip

INSTALL = install(NEWEST, "torch", "torch_xla", "libtpu")

# Variables from older guides that torch_xla still obeys, or that belong to a machine set up for something else.
LEFT_OVER = {
    "XRT_TPU_CONFIG": "it belongs to XRT, which torch_xla gave up in 2023",
    "XLA_USE_BF16": "it turns all weights into bf16, while --mixed-precision bf16 keeps them in fp32",
    "XLA_DOWNCAST_BF16": "it turns all weights into bf16, while --mixed-precision bf16 keeps them in fp32",
    "XLA_USE_SPMD": "workers cannot start while it is set",
    "TPU_LOAD_LIBRARY": "it was for TensorFlow beside torch_xla; uninstall TensorFlow instead",
}

# Words in the runtime's messages -> what is wrong and its fix, from users' reports.
_WRONG_LIBTPU = f"libtpu is of another version than torch_xla was built with; {INSTALL}"
_TPU_IS_HELD = "another process holds the TPU; end it, or restart it if it is a notebook's kernel"
SYMPTOMS = {
    "undefined symbol": f"torch and torch_xla do not fit together; {INSTALL}",
    "PJRT API version": _WRONG_LIBTPU,
    "Unexpected PJRT_": _WRONG_LIBTPU,
    "already in use": _TPU_IS_HELD,
    "not permitted": _TPU_IS_HELD,
    "Device or resource busy": _TPU_IS_HELD,
    "worker addresses": f"unset {' and '.join(SET_FOR_ONE_PROCESS)}",
    "No visible GPU": "the CUDA plugin sees no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    "Couldn't interpret value": "correct that flag in XLA_FLAGS, or unset XLA_FLAGS",
    "XLA_FLAGS": "correct it, or unset XLA_FLAGS",
    "metadata.google.internal": "no TPU metadata here; choose the machine's TPU runtime, or PJRT_DEVICE=CPU",
}

LOCKFILE = Path("/tmp/libtpu_lockfile")
LEAST_MEMORY = 2 * 10**9

PROBE = """
import json, torch_xla, torch_xla.runtime as xr
kind = torch_xla._XLAC._xla_device_kind(str(torch_xla.device()))
print(json.dumps({"type": xr.device_type(), "count": len(torch_xla.real_devices()), "kind": kind}))
"""


def _check_folder(flag: str, name: str) -> None:
    if is_url(name):
        raise InputError(f"{flag} {name}: is examined as --bucket {name}")


@dataclass(frozen=True)
class DoctorConfig:
    """Doctor"""

    checkpoints_dir: str = option(
        "./checkpoints", "folder for checkpoints: has it enough room?", is_path=True, check=_check_folder
    )
    timeout: int = option(180, "seconds to wait for the devices")
    bucket: str | None = option(
        None,
        "URL for checkpoints, such as gs://bucket/run: is it fit for a run, and how fast? In a minute, without devices",
    )


@dataclass(frozen=True)
class Machine:
    """What the doctor looks at on a machine. Tests build their own."""

    environment: Mapping[str, str]
    python: tuple[int, int]
    versions: Mapping[str, str]  # of the installed packages, by the name of the distribution
    tpu_chips: int = 0
    gpus: int = 0
    device_files: list[str] = field(default_factory=list)  # /dev/accel*, /dev/vfio/* and /dev/nvidia*
    holders: list[str] = field(default_factory=list)  # "program (pid N)" for each process that has a TPU's file open
    lockfile: bool = False  # whether libtpu's lock file exists
    free_disk: int | None = 10**12  # bytes free for checkpoints; None if nothing can be written there
    free_memory: int | None = None  # bytes; None if unknown

    @classmethod
    def here(cls, checkpoints_dir: Path) -> Machine:
        """Look at this machine."""
        patterns = ("accel*", "vfio/*", "nvidia[0-9]*")
        files = sorted(str(file) for pattern in patterns for file in Path("/dev").glob(pattern))
        return cls(
            environment=dict(os.environ),
            python=sys.version_info[:2],
            versions=installed(PACKAGES),
            tpu_chips=len(tpu_chips()),
            gpus=gpus(os.environ),
            device_files=files,
            holders=_holders([file for file in files if "nvidia" not in file]),
            lockfile=LOCKFILE.exists(),
            free_disk=_free_disk(checkpoints_dir),
            free_memory=free_host_memory(),
        )


def problems(machine: Machine) -> Iterator[str]:
    """Yield one line for each known problem of such a machine, with its fix."""
    for about in (_about_versions, _about_environment, _about_the_tpu, _about_room):
        yield from about(machine)


def _about_versions(machine: Machine) -> Iterator[str]:
    versions, uses_tpu = machine.versions, _uses_tpu(machine)
    if not (3, 10) <= machine.python < (3, 14):
        version = ".".join(map(str, machine.python))
        yield f"Python {version}: torch_xla runs on 3.10 to 3.13; make an environment with one of them"
    yield from misfits(versions, uses_tpu)
    if "libtpu-nightly" in versions:
        fix = f"pip uninstall -y libtpu-nightly libtpu, then {install(release_for(versions), 'libtpu')}"
        yield f"libtpu-nightly overwrites libtpu's files; {fix}"
    for name in ("tensorflow", "tensorflow-tpu"):
        if uses_tpu and name in versions:
            yield f"{name} takes the TPU when something imports it; pip uninstall -y {name} (tensorflow-cpu is fine)"
    if tuple(map(int, versions.get("numpy", "1.26").split(".")[:2])) < (1, 26):
        yield f"numpy {versions['numpy']} is too old for torch; pip install 'numpy>=1.26'"


def _about_environment(machine: Machine) -> Iterator[str]:
    environment = machine.environment
    try:
        prepare(dict(environment))
    except InputError as error:
        yield str(error)
    for name in SET_FOR_ONE_PROCESS:
        if name in environment and not notebook_host(environment):
            yield f"{name} is set for one process, and each of torch_xla's processes would use it; unset {name}"
    for name, why in LEFT_OVER.items():
        if environment.get(name, "0") not in ("", "0"):
            yield f"{name} is set: {why}; unset {name}"
    for file in environment.get("LD_PRELOAD", "").replace(":", " ").split():
        if "/" in file and not Path(file).exists():
            yield f"LD_PRELOAD names {file}, which does not exist; unset LD_PRELOAD, or install the file"
    library = environment.get("TPU_LIBRARY_PATH")
    if library and not Path(library).exists():
        yield f"TPU_LIBRARY_PATH names {library}, which does not exist; unset TPU_LIBRARY_PATH"


def _about_the_tpu(machine: Machine) -> Iterator[str]:
    for holder in machine.holders:
        yield f"{holder} holds the TPU; end it, or restart it if it is a notebook's kernel"
    # Compiling for TPUs leaves such a file too, on machines without a TPU.
    if machine.lockfile and machine.device_files and not machine.holders:
        yield (
            f"{LOCKFILE} is left over, unless another user's process holds the TPU (sudo lsof -w /dev/accel* /dev/vfio/* "
            f"shows it); sudo rm {LOCKFILE}"
        )


def _about_room(machine: Machine) -> Iterator[str]:
    if machine.free_disk is None:
        yield "--checkpoints-dir cannot be written to; choose another"
    elif machine.free_disk < CHECKPOINT_BYTES:
        yield (
            f"--checkpoints-dir has {_gigabytes(machine.free_disk)} free, less than one checkpoint of GPT-2 (124M) takes; "
            "free some, or choose another"
        )
    if machine.free_memory is not None and machine.free_memory < LEAST_MEMORY:
        yield f"only {_gigabytes(machine.free_memory)} of memory are free; end other programs, or choose a larger machine"


def notes(machine: Machine) -> Iterator[str]:
    """Yield what looks wrong but is handled by run_pretrain_xla.py, and what works but could be faster."""
    host = notebook_host(machine.environment)
    for name in SET_FOR_ONE_PROCESS:
        if host and name in machine.environment:
            yield f"{host} sets {name}; run_pretrain_xla.py removes it (in your own program: os.environ.pop({name!r}))"
    why = why_no_kernels(release_for(machine.versions), machine.versions.get("jax"))
    if why and _uses_tpu(machine) and not any(misfits(machine.versions, uses_tpu=True)):
        yield f"training works, but without flash attention a step takes about a third longer: {why}"
    if "libtpu" in machine.versions and _uses_tpu(machine) and (why := compiler_flags.why_none()):
        yield f"training works, but without our compiler flags, which make a step faster: {why}"


def probe(environment: Mapping[str, str], timeout: float, program: str = PROBE) -> dict[str, str | int]:
    """Return what torch_xla sees, as {"type": "TPU", "count": 8, "kind": "TPU v5 lite"}. It runs in another process.

    Raises RunFailed if that fails or does not answer within `timeout` seconds. The message holds the fix if it is known."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", program], env=dict(environment), capture_output=True, text=True, check=False,
            timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunFailed(
            f"no answer from the devices within {timeout:g} s: another process may hold them; on a pod, start the doctor on "
            "all workers at once"
        ) from None
    if answer.returncode == 0:
        return json.loads(answer.stdout.splitlines()[-1])
    said = answer.stderr.strip()
    symptom = next((symptom for symptom in SYMPTOMS if symptom in said), None)
    if symptom is None:
        print(said, file=sys.stderr, flush=True)
    fix = SYMPTOMS[symptom] if symptom else "see the full output on stderr"
    lines = [line for line in said.splitlines() if (symptom or "Error") in line] or said.splitlines() or ["no message"]
    raise RunFailed(f"the devices do not start (exit code {answer.returncode}): {lines[-1].strip()[:300]}: {fix}")


def main() -> None:
    options = parse_options(DoctorConfig, "Look for known problems before a run on XLA devices.")
    if options.bucket is None:
        found = _examine_machine(options)
    else:
        print(options.bucket)
        found = examine(options.bucket, _show_row)
    for line in found:
        print(f"problem: {line}")
    if found:
        ending = "1 problem found; its line" if len(found) == 1 else f"{len(found)} problems found; each line"
        raise RunFailed(f"{ending} ends with the fix")
    print("no problems found")


def _examine_machine(options: DoctorConfig) -> list[str]:
    """Show what this machine has, and return its problems."""
    machine = Machine.here(Path(options.checkpoints_dir))
    found = list(problems(machine))
    _show("versions", {"gpt2xla": __version__, "Python": platform.python_version(), **machine.versions})
    files = " ".join(machine.device_files) or "none"
    room = "cannot be written to" if machine.free_disk is None else f"{_gigabytes(machine.free_disk)} free"
    _show(
        "machine",
        {
            "PJRT_DEVICE": machine.environment.get("PJRT_DEVICE", "not set"),
            "TPU chips": str(machine.tpu_chips),
            "NVIDIA GPUs": str(machine.gpus),
            "device files": files,
            options.checkpoints_dir: room,
            "memory": "unknown" if machine.free_memory is None else f"{_gigabytes(machine.free_memory)} free",
        },
    )
    environment = dict(machine.environment)
    try:
        prepare(environment)
        seen = probe(environment, options.timeout)
        ours = {name: environment[name] for name in (compiler_flags.VARIABLE,) if name in environment}
        _show("devices", {str(seen["kind"]): f"{seen['count']} of type {seen['type']}", **ours})
    except InputError:
        _show("devices", {"not tried": "fix the problem below first"})
    except RunFailed as error:
        _show("devices", {"failed": "see below"})
        found.append(str(error))
    for note in notes(machine):
        print(f"note: {note}")
    return found


def _show(title: str, rows: Mapping[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        _show_row(name, value)


def _show_row(name: str, value: str) -> None:
    print(f"  {name:<16} {value}", flush=True)


def _uses_tpu(machine: Machine) -> bool:
    return machine.tpu_chips > 0 or machine.environment.get("PJRT_DEVICE") == "TPU"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _holders(device_files: list[str]) -> list[str]:
    """Return the processes that have one of the files open, as far as this user may see them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in device_files for fd in (folder / "fd").iterdir()):
                found.append(f"{(folder / 'comm').read_text().strip()} (pid {folder.name})")
        except OSError:  # the process has ended, or is another user's
            continue
    return found


def _free_disk(folder: Path) -> int | None:
    """Return the bytes free where `folder` is or would be made; None if nothing can be written there."""
    folder = folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free if existing.is_dir() and os.access(existing, os.W_OK) else None


if __name__ == "__main__":
    sys.exit(exit_code(main))
