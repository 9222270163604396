"""The flags of a TPU's compiler that make our training step faster, by kind of TPU. Imports no torch_xla.

The compiler is libtpu. It reads LIBTPU_INIT_ARGS once, when it is loaded, and ends a process for a flag that it does not
know. The flags were chosen by compiling the step with and without them: `benchmarks/tpu_flags.py`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path

from gpt2xla.runtime.xla.versions import installed, is_of

VARIABLE = "LIBTPU_INIT_ARGS"

# The releases of libtpu that were tried. In others a flag may be gone, or do harm.
_TRIED = ("0.0.21", "0.0.17")

# How much of the fast memory next to the cores (VMEM) one fused operation may fill, in KiB; the default is 16 MiB of the
# 128 MiB of v5e and v6e. With more, large products read their operands from slow memory fewer times: the logits take 27% and
# 36% fewer cycles. Beyond 64 MiB little is gained. On v3 it is all there is, and on v4 a higher limit changes nothing.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"

_REPLICAS: Mapping[str, Mapping[str, str]] = {"TPU v5 lite": {_VMEM: "65536"}, "TPU v6 lite": {_VMEM: "65536"}}

# In addition, where weights and state are divided over the devices (--spmd --fsdp).
_FSDP: Mapping[str, Mapping[str, str]] = {}


def chosen(kind: str, *, fsdp: bool = False) -> dict[str, str]:
    """Return our flags for devices that call themselves `kind`, such as "TPU v5 lite", and their values."""
    return {**_REPLICAS.get(kind, {}), **(_FSDP.get(kind, {}) if fsdp else {})}


def with_ours(arguments: str | None, kind: str, *, fsdp: bool = False) -> str:
    """Return the value of LIBTPU_INIT_ARGS that holds the user's `arguments` and our flags for `kind`.

    A flag that the user gives keeps the user's value. Nothing is added to a value that is set but empty, nor if the
    installed libtpu was not tried."""
    if arguments == "" or why_none():
        return arguments or ""
    users = [arguments] if arguments else []
    given = {argument.lstrip("-").split("=")[0] for argument in " ".join(users).split()}
    return " ".join(
        users + [f"--{name}={value}" for name, value in chosen(kind, fsdp=fsdp).items() if name not in given]
    )


def add_to(environment: MutableMapping[str, str], kind: str | None, *, fsdp: bool = False) -> str | None:
    """Add our flags for `kind` to `environment`; None is a kind that is not known.

    Return a warning if it is too late: a process that has loaded libtpu does not read them any more."""
    before = environment.get(VARIABLE)
    after = with_ours(before, kind or "", fsdp=fsdp)
    if after == (before or ""):
        return None
    if is_loaded():
        return (
            "libtpu is loaded already, so that its compiler lacks our flags and training is slower; restart the notebook's "
            "kernel and start training before anything else uses the TPU"
        )
    environment[VARIABLE] = after
    return None


def why_none() -> str | None:
    """Return why none of our flags is set with the installed libtpu, whatever the device; None if nothing forbids them."""
    version = installed(["libtpu"]).get("libtpu")
    if version is None or not any(is_of(version, tried) for tried in _TRIED):
        return f"they were chosen with libtpu {' and '.join(_TRIED)}, and {version or 'none'} is installed"
    return None


def is_loaded(maps: Path = Path("/proc/self/maps")) -> bool:
    """Tell whether libtpu is loaded in this process."""
    return maps.exists() and "/libtpu.so" in maps.read_text()
