"""Reads llm.c's model files, such as gpt2_124M.bin (github.com/karpathy/llm.c, `write_model` in train_gpt2.py).

A file begins with 256 int32: magic, version, positions, ids, layers, heads, width, ids with padding. The parameters follow,
each for all layers in a row, matrices as in nn.Linear. The activation is GPT-2's; the head is the token embedding.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2xla.checkpoint.formats.stored_weights import StoredTensor, StoredWeights, parameter_shapes
from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError, user_error

_HEADER_BYTES = 1024
_DTYPES = {3: torch.float32, 5: torch.bfloat16}


def load_llmc_model(file: Path) -> tuple[ModelConfig, StoredWeights]:
    """Return the configuration and the weights, without the rows that pad the vocabulary. Raises InputError if the file is
    damaged, or of another version."""
    with user_error(str(file)):
        header = np.fromfile(file, "<i4", 8).tolist()
        size = file.stat().st_size
    if len(header) < 8 or header[1] not in _DTYPES:
        version = header[1] if len(header) > 1 else "none"
        raise InputError(
            f"{file}: version {version} of llm.c's model files is not supported; write it again with today's llm.c"
        )
    version, positions, ids, layers, heads, width, rows = header[1:]
    dtype = _DTYPES[version]
    try:
        config = ModelConfig(ids, positions, width, layers, heads, dropout=0.0, activation="gelu-tanh")
        config.check()
    except InputError as error:
        raise InputError(f"{file}: its header is damaged ({error}); copy it again") from None
    if rows < ids:
        raise InputError(f"{file}: its header is damaged ({rows} rows for {ids} ids); copy it again")
    shapes = parameter_shapes(config)
    in_block = [name.removeprefix("h.0.") for name in shapes if name.startswith("h.0.")]  # in the file's order, too
    in_blocks = [f"h.{layer}.{name}" for name in in_block for layer in range(layers)]
    tensors: dict[str, StoredTensor] = {}
    offset = _HEADER_BYTES // dtype.itemsize
    for name in ("wte.weight", "wpe.weight", *in_blocks, "ln_f.weight", "ln_f.bias"):
        tensors[name] = StoredTensor(name, shapes[name], dtype, partial(_read, file, dtype, offset, shapes[name]))
        offset += rows * width if name == "wte.weight" else shapes[name].numel()
    expected = offset * dtype.itemsize
    if size != expected:
        raise InputError(f"{file} has {size:,} bytes where its header says {expected:,}; copy it again")
    return config, StoredWeights(config, tensors, file)


def _read(file: Path, dtype: torch.dtype, offset: int, shape: torch.Size) -> Tensor:
    # Mapped again for each tensor, so that the file's pages leave memory together with the tensor.
    with user_error(str(file)):
        numbers = np.memmap(file, np.uint8, "c", offset * dtype.itemsize, shape.numel() * dtype.itemsize)
    return torch.frombuffer(numbers, dtype=dtype).view(shape)
