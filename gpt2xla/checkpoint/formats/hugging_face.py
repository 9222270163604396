"""Hugging Face GPT-2 folders in and out: configuration, parameter names and layouts, both ways."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2xla import hub
from gpt2xla.checkpoint.formats.file_kind import describe_folder, kind_of, refuse_adapter
from gpt2xla.checkpoint.formats.hf_config import read_config
from gpt2xla.checkpoint.formats.parameter_names import CONV1D, in_our_names, is_bias, is_mask, with_tied_head
from gpt2xla.checkpoint.formats.stored_weights import StoredTensor, StoredWeights
from gpt2xla.checkpoint.formats.torch_file import load_plain, stored_tensors
from gpt2xla.config import PRESETS, ModelConfig
from gpt2xla.data import tokenizer_folder
from gpt2xla.errors import InputError
from gpt2xla.files import read_json
from gpt2xla.generation.settings import GENERATION_CONFIG, GenerationSettings

ACTIVATIONS = {"gelu-tanh": "gelu_new", "gelu-exact": "gelu", "relu": "relu"}

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# Not by model*: repositories hold the same weights in further types and formats, too.
_HUB_FILES = (
    "config.json", GENERATION_CONFIG, "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", *tokenizer_folder.FILES,
)  # fmt: skip
# Fetched only where there are no safetensors.
_HUB_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
# A hub id may end in these, but a path more likely does.
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def save_model(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    eot_id: int | None = None,
    settings: GenerationSettings | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`, as `GPT2LMHeadModel` reads them.

    `settings` says which tokens begin and end a text; default: `eot_id` alone.
    """
    settings = settings or GenerationSettings.ending_with(eot_id)
    values = to_hf_config(config, None)
    values = {key: value for key, value in values.items() if not key.endswith("_token_id")} | settings.config
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if settings.generation is not None:
        generation = json.dumps(settings.generation, indent=2) + "\n"
        (folder / GENERATION_CONFIG).write_text(generation, encoding="utf-8")
    save_file(to_hf_state(config, state), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors shuts out other users


def load_model(folder: Path) -> tuple[ModelConfig, StoredWeights]:
    """Configuration and weights of a Hugging Face GPT-2 folder, in one file or in several with an index.

    Raises:
        InputError: the folder holds no GPT-2 that this trainer can express, or no weights.
    """
    refuse_adapter(folder)
    if not (folder / "config.json").exists():
        raise InputError(describe_folder(folder, "config.json"))
    config, notes = read_config(folder)
    return weights_in(_weight_files(folder), folder, config, notes)


def weights_in(
    files: list[Path], source: Path, config: ModelConfig, notes: tuple[str, ...]
) -> tuple[ModelConfig, StoredWeights]:
    """The weights in these files of `source`, and `config` as they complete it. Raises InputError."""
    stored = {name: tensor for file in files for name, tensor in _stored(file).items()}
    tensors = in_our_names(stored, source)
    biases = {name: tensor for name, tensor in tensors.items() if is_bias(name)}
    if not config.bias and any(tensor.read().any() for tensor in biases.values()):
        # Saved without biases, which Hugging Face then trained: it knows no model that has none.
        config = dataclasses.replace(config, bias=True)
    if not config.bias:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
    if config.tie_weights:
        keep = 'to keep both, write "tie_word_embeddings": false into config.json'
        tensors = with_tied_head(tensors, source, keep)
    return config, StoredWeights(config, tensors, source, notes)


def _weight_files(folder: Path) -> list[Path]:
    """As transformers looks for them: safetensors first, one file before several."""
    for name, parts in (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _parts(index)
        if any(folder.glob(parts)):
            raise InputError(f"{index} is missing, which names the parts of the model; copy it too")
    raise InputError(describe_folder(folder, "model.safetensors or pytorch_model.bin"))


def _parts(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [index.with_name(Path(name).name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} cannot be read ({type(error).__name__}); copy it again") from None
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing, which {index.name} names; copy it too")
    return files


def _stored(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by their names there."""
    if kind_of(file) == "torch":
        return stored_tensors(load_plain(file, mapped=True), file)
    out: dict[str, StoredTensor] = {}
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no dictionary
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
    # Opened for each tensor, so that its pages of the file leave memory with it.
    with _opened(file) as tensors:
        return tensors.get_tensor(name)


def find_folder(name: str) -> Path:
    """Return a local folder as it is; look any other name up on the Hugging Face hub and fetch it into the hub's cache.

    Every process of a host may call this at once, before there is a runtime: one of them fetches, the others wait.

    Raises:
        InputError: there is neither such a folder nor, as far as can be seen from here, such a model.
    """
    if Path(name).is_dir():
        return Path(name)
    hub_id = f"openai-community/{name}" if name in PRESETS else name
    with hub.explained(f"{name}: no such folder or file", hub_id, "give the path of a folder that holds the model"):
        folder = hub.snapshot(hub_id, _HUB_FILES)
        if not any(folder.glob("model*.safetensors*")):
            folder = hub.snapshot(hub_id, _HUB_PICKLES)
        return folder


def is_missing_path(name: str) -> bool:
    """Whether `name` is a path with nothing there: one that the hub could not know, or one into a folder that is here."""
    path = Path(name)
    if path.exists():
        return False
    if not hub.is_id(name):
        return True
    return path.suffix in _FILE_SUFFIXES or (path.parent != Path() and path.parent.is_dir())


def to_hf_config(config: ModelConfig, eot_id: int | None) -> dict[str, Any]:
    """The contents of `config.json`. Hugging Face keeps the keys it does not know."""
    own: dict[str, Any] = {"gpt2xla_bias": config.bias}
    if config.vocab_padding:
        own["gpt2xla_vocab_size"] = config.vocab_size
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.real_vocab_size,
        "n_positions": config.seq_length,
        "n_ctx": config.seq_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": ACTIVATIONS[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": "float32",
        **own,
    }


def to_hf_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights in Hugging Face's names and layouts, without the padding of the vocabulary. Absent biases become zeros,
    which compute the same."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        their_name = name if name.startswith("lm_head") else f"transformer.{name}"
        if name in ("wte.weight", "lm_head.weight"):
            tensor = tensor[: config.real_vocab_size]
        out[their_name] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor.contiguous()
        module = name.removesuffix(".weight")
        if not config.bias and module.rsplit(".")[-1] not in ("wte", "wpe", "lm_head"):
            out[f"transformer.{module}.bias"] = tensor.new_zeros(tensor.shape[0])
    return out


def from_hf_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse, of weights in memory."""
    out: dict[str, Tensor] = {}
    for their_name, tensor in state.items():
        name = their_name.removeprefix("transformer.")
        if not (
            is_mask(name) or (is_bias(name) and not config.bias) or (name == "lm_head.weight" and config.tie_weights)
        ):
            out[name] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor
    return out
