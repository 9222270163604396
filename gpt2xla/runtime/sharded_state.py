"""State that is split over devices, through torch.distributed.checkpoint: each device's part goes to disk as it is, and any
number of devices, on any runtime, reads the whole.

DCP's usual storage keeps its index as a pickle, which must not be loaded from a stranger's folder. Its safetensors storage
has none: offsets stand in the header of each file."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from gpt2xla.errors import in_one_line

State = dict[str, dict[str, Tensor]]


def save(folder: Path, state: State, planner: SavePlanner, *, devices: int, distributed: bool) -> None:
    """Write this process's parts of `state`, a file for each of its `devices`. With `distributed`, all processes of the
    default group call it."""
    with _quiet():
        dcp.save(state, storage_writer=_FilePerDevice(folder, devices), planner=planner, no_dist=not distributed)


def load(folder: Path, shapes: dict[str, dict[str, torch.Size]]) -> State:
    """The whole tensors, fp32, on the CPU. Raises ValueError if the folder does not hold exactly those of `shapes`."""
    # What no part fills stays NaN, which a trained state never is: DCP does not check that the parts make a whole.
    state = {key: {name: torch.full(shape, math.nan) for name, shape in part.items()} for key, part in shapes.items()}
    try:
        with _quiet():
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, SafetensorError, OSError, RuntimeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(in_one_line(error)) from None
    for part in state.values():
        for name, tensor in part.items():
            if tensor.isnan().any():
                raise ValueError(f"parts of {name} are missing")
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that are not for the user: of a single process, which is meant, and of torch_xla's planner's ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _FilePerDevice(HuggingFaceStorageWriter):
    """The writer knows one part of a tensor per file, as of one process per device; here a process has several."""

    def __init__(self, folder: Path, devices: int) -> None:
        names = inspect.signature(HuggingFaceStorageWriter.__init__).parameters
        in_parts = "save_distributed" if "save_distributed" in names else "save_sharded"  # torch 2.8's name for it
        # Of the mapping only its largest number matters here: it is in the files' names.
        super().__init__(str(folder), fqn_to_index_mapping={"": devices}, **{in_parts: True})
        # No copies ahead in a CUDA stream: tensors are not on a GPU, and torchax, which torch_xla imports where flax is
        # installed, makes the writer take JAX for a device that has streams.
        self.per_thread_copy_ahead = 0

    def _split_by_storage_plan(
        self, storage_plan: dict[str, int] | None, items: list[WriteItem]
    ) -> dict[int, list[WriteItem]]:
        by_device = defaultdict(list)
        for item in items:
            by_device[1 + (item.index.index or 0)].append(item)
        return by_device
