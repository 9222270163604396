"""Weights that stay on disk and are read one tensor at a time, so that a large model has no second copy in memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError
from gpt2xla.model.gpt2 import GPT2

_BY_ID = {"wte.weight", "lm_head.weight"}  # parameters with a row for each id
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by its file's header."""

    name: str  # in the file
    shape: torch.Size  # of what `read` returns
    dtype: torch.dtype | str  # the file's name for the type if torch has no such type
    read: Callable[[], Tensor]  # returns the tensor, possibly as a view of the mapped file

    def transposed(self) -> StoredTensor:
        return dataclasses.replace(self, shape=self.shape[::-1], read=lambda: self.read().t())


class StoredWeights(Mapping[str, Tensor]):
    """A model's weights by our parameter names. Each access reads the tensor, in fp32 on the CPU.

    If the model pads its vocabulary, only the real rows are stored.

    Args:
        tensors: by our parameter names, in our layout.
        source: the file or folder, for messages.
        notes: lines for the user about how the weights are read.

    Raises InputError if these are not the tensors of such a model. The message names the first one that is wrong."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, StoredTensor], source: Path, notes: tuple[str, ...] = ()
    ) -> None:
        expected = parameter_shapes(dataclasses.replace(config, vocab_size=config.real_vocab_size, vocab_padding=0))
        if missing := [name for name in expected if name not in tensors]:
            raise InputError(
                f"{source} has no tensor {missing[0]}, which a model of its configuration needs; copy it again"
            )
        for name, tensor in tensors.items():
            if name not in expected:
                raise InputError(
                    f"{source} holds {tensor.name}, which a GPT-2 of its configuration does not have; choose another"
                )
            if tensor.shape != expected[name]:
                raise InputError(
                    f"{source}: {tensor.name} is {_sizes(tensor.shape)} where its configuration says "
                    f"{_sizes(expected[name])} (in the layout of nn.Linear); fix the configuration, or choose another"
                )
            if tensor.dtype not in FLOATS:
                raise InputError(
                    f"{source}: {tensor.name} is of type {tensor.dtype}; save the model in float32, bfloat16 or float16"
                )
        self._tensors = {name: tensors[name] for name in expected}
        if any(tensor.dtype == torch.float64 for tensor in self._tensors.values()):
            notes = (*notes, "weights: stored in float64, rounded to fp32")
        self.notes = notes

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read().float()

    def with_mean_rows(self, known: int, ids: int) -> StoredWeights:
        """Return the weights of the same model with `ids` ids. The rows of the embedding and of an untied head are the first
        `known` ones, then their mean in fp32, as transformers' `mean_resizing` (Hewitt 2021) without its noise."""
        twin = copy.copy(self)
        for name in _BY_ID & self._tensors.keys():
            stored = self._tensors[name]
            shape = torch.Size((ids, stored.shape[1]))
            read = partial(_with_mean_rows, stored, known, ids)
            twin._tensors = twin._tensors | {name: StoredTensor(stored.name, shape, torch.float32, read)}
        return twin

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of each parameter by its name."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT2(config).named_parameters()}


def _with_mean_rows(stored: StoredTensor, known: int, ids: int) -> Tensor:
    rows = stored.read()[:known].float()
    return torch.cat([rows, rows.mean(dim=0).expand(ids - known, -1)])


def _sizes(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a single number"
