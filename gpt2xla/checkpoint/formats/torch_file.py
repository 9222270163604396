"""Reads files of torch.save as tensors and plain values. Nothing in them is run."""

from __future__ import annotations

import contextlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2xla.checkpoint.formats.stored_weights import StoredTensor
from gpt2xla.errors import InputError


class PlainConfig:
    """Stands in for a pickled `GPTConfig`, a dataclass of numbers that build-nanogpt and others save with a model. It only
    keeps the state that the file gives it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_plain(file: Path, mapped: bool = False) -> Any:
    """Return the file's contents: tensors, plain values and PlainConfigs.

    With `mapped`, tensors stay on disk until they are used, if the format allows it. Raises InputError if the file is
    damaged, or holds other objects. None of them is created."""
    try:
        is_zip = zipfile.is_zipfile(file)  # torch's older format is not, and must be read whole
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file)) if is_zip else []
        stand_ins: list[Any] = [(PlainConfig, name) for name in names if name.rpartition(".")[2] == "GPTConfig"]
        # torch 2.14 reads the other format where a path has that ending, whatever is in the file.
        is_misnamed = file.suffix == ".safetensors"
        mapped = mapped and is_zip and not is_misnamed
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(), file.open("rb") as opened:
            warnings.simplefilter("ignore")  # torch's advice on formats
            return torch.load(opened if is_misnamed else file, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle can make the reader raise anything
        raise InputError(f"{file} {_why(file, error)}") from None


def stored_tensors(state: Any, file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict by name. Raises InputError if it holds anything else."""
    if not isinstance(state, dict):
        raise InputError(f"{file} holds no tensors by name; choose another file")
    for name, tensor in state.items():
        if not isinstance(name, str) or not is_plain(tensor):
            raise InputError(
                f"{file}: {str(name)[:80]!r} among the model's weights is not a tensor; choose another file"
            )
    return {name: StoredTensor(name, tensor.shape, tensor.dtype, tensor.detach) for name, tensor in state.items()}


def is_plain(tensor: Any) -> bool:
    """Tell whether it is a dense tensor with its numbers: not sparse, not quantized, not on the meta device."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
    )


def _why(file: Path, error: Exception) -> str:
    """Say in our words what is wrong. torch's own messages advise running what the file holds."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or type(error).__name__}"
    what = "a Lightning checkpoint, " if _is_lightnings(file) else ""
    if found := re.search(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) ([\w.]+)", str(error)):
        return (
            f"is not read: {what}it holds an object made by {found[1]}, not only tensors and plain values; nothing in it "
            "was run; save the model's state_dict alone, with its config.json beside it"
        )
    return "is damaged, or holds more than tensors and plain values: nothing in it was run; copy it again"


def _is_lightnings(file: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return any(b"pytorch-lightning_version" in archive.read(name) for name in pickles)
    return False
