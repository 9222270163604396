"""Reads and writes Hugging Face GPT-2 folders."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2xla import hub
from gpt2xla.checkpoint.formats.file_kind import describe_folder, kind_of
from gpt2xla.checkpoint.formats.hf_config import read_config, to_hf_config
from gpt2xla.checkpoint.formats.parameter_names import in_our_names, is_bias, to_hf_state, with_tied_head
from gpt2xla.checkpoint.formats.stored_weights import StoredTensor, StoredWeights
from gpt2xla.checkpoint.formats.torch_file import load_plain, stored_tensors
from gpt2xla.config import PRESETS, ModelConfig
from gpt2xla.data import tokenizer_folder
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError
from gpt2xla.files import read_json
from gpt2xla.generation.settings import GENERATION_CONFIG, GenerationSettings

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# Patterns of the files beside the weights, and of the weights. Not model*: folders also hold the same weights in other types
# and formats.
SMALL_FILES = ("config.json", GENERATION_CONFIG, *tokenizer_folder.FILES)
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
# Fetched only where there are no safetensors.
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


def save_model(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], settings: GenerationSettings) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`, as `GPT2LMHeadModel` reads them."""
    values = to_hf_config(config) | settings.config
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if settings.generation is not None:
        generation = json.dumps(settings.generation, indent=2) + "\n"
        (folder / GENERATION_CONFIG).write_text(generation, encoding="utf-8")
    save_file(to_hf_state(config, state), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors would deny other users access


def save_tokenizer(folder: Path, tokenizer: Tokenizer, seq_length: int) -> None:
    """Write the tokenizer's files. transformers then warns of texts longer than the model's `seq_length`."""
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    values = read_json(file)
    if values.get("model_max_length") != seq_length:
        values["model_max_length"] = seq_length
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_model(folder: Path) -> tuple[ModelConfig, StoredWeights]:
    """Return configuration and weights of a Hugging Face GPT-2 folder. The weights may be in parts with an index. Raises
    InputError if the folder does not hold a GPT-2 that is supported here, or no weights."""
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} is a LoRA or other PEFT adapter, not a whole model; merge it into its base model with peft "
            "(merge_and_unload) and save that with save_pretrained"
        )
    if not (folder / "config.json").exists():
        raise InputError(describe_folder(folder, "config.json"))
    config, notes = read_config(folder)
    return weights_in(_weight_files(folder), folder, config, notes)


def weights_in(
    files: list[Path], source: Path, config: ModelConfig, notes: tuple[str, ...]
) -> tuple[ModelConfig, StoredWeights]:
    """Return the weights in these files of `source`, and `config`, with biases if the weights have any. Raises InputError if
    a file is damaged, or its tensors do not fit the configuration."""
    stored = {name: tensor for file in files for name, tensor in _stored(file).items()}
    tensors = in_our_names(stored, source)
    if not config.bias:
        if any(tensor.read().any() for name, tensor in tensors.items() if is_bias(name)):
            # Hugging Face has no GPT-2 without biases: it trained those of a model that was saved here without any.
            config = dataclasses.replace(config, bias=True)
        else:
            tensors = {name: tensor for name, tensor in tensors.items() if not is_bias(name)}
    if config.tie_weights:
        keep = 'to keep both, write "tie_word_embeddings": false into config.json'
        tensors = with_tied_head(tensors, source, keep)
    return config, StoredWeights(config, tensors, source, notes)


def _weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights, in the order of transformers: safetensors first, one file before several."""
    for name, parts in (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _parts(index)
        if any(folder.glob(parts)):
            raise InputError(f"{index} is missing, the list of the model's parts; copy it too")
    raise InputError(describe_folder(folder, "model.safetensors or pytorch_model.bin"))


def _parts(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [index.with_name(Path(name).name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} cannot be read ({type(error).__name__}); copy it again") from None
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing, although {index.name} names it; copy it too")
    return files


def _stored(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by their names in it."""
    if kind_of(file) == "torch":
        return stored_tensors(load_plain(file, mapped=True), file)
    out: dict[str, StoredTensor] = {}
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a dictionary
            header = tensors.get_slice(name)
            dtype = _DTYPES.get(header.get_dtype(), header.get_dtype())
            out[name] = StoredTensor(name, torch.Size(header.get_shape()), dtype, partial(_read, file, name))
    return out


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged ({error}); copy it again") from None


def _read(file: Path, name: str) -> Tensor:
    # Opened again for each tensor, so that the file's pages leave memory together with the tensor.
    with _opened(file) as tensors:
        return tensors.get_tensor(name)


def files_of_model(names: Iterable[str]) -> list[str]:
    """Return which of a folder's files, given by their names in it, are to be fetched to have its model."""

    def matching(patterns: Iterable[str]) -> list[str]:
        return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))

    return matching(SMALL_FILES) + (matching(_SAFETENSORS) or matching(_PICKLES))


def find_folder(name: str) -> Path:
    """Return a local folder as it is; look any other name up on the Hugging Face hub and fetch it into the hub's cache.

    Every process of a host may call this at once, before there is a runtime: one of them fetches, the others wait. Raises
    InputError if there is neither such a folder nor, as far as can be seen from here, such a model."""
    if Path(name).is_dir():
        return Path(name)
    hub_id = f"openai-community/{name}" if name in PRESETS else name
    with hub.explained(f"{name}: no such folder or file", hub_id, "give the path of a folder that holds the model"):
        folder = hub.snapshot(hub_id, (*SMALL_FILES, *_SAFETENSORS))
        if not any(folder.glob("model*.safetensors*")):
            folder = hub.snapshot(hub_id, _PICKLES)
        return folder
