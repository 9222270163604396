"""Hugging Face GPT-2 folders in and out: configuration, parameter names and layouts, both ways."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2xla.config import PRESETS, ModelConfig
from gpt2xla.errors import InputError
from gpt2xla.json_file import read_json
from gpt2xla.weights import StoredTensor, StoredWeights

T = TypeVar("T")

ACTIVATIONS = {"gelu-tanh": "gelu_new", "gelu-exact": "gelu", "relu": "relu"}
# Hugging Face's GPT-2 keeps these as Conv1D: (in, out) where nn.Linear has (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I8": torch.int8}
# Not by model*: repositories hold the same weights in further types and formats, too.
_HUB_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip


def save_model(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], eot_id: int | None) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`, as `GPT2LMHeadModel` reads them."""
    values = to_hf_config(config, eot_id)
    generation = {"bos_token_id": eot_id, "eos_token_id": eot_id, "do_sample": True}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_file(to_hf_state(config, state), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors shuts out other users


def load_model(folder: Path) -> tuple[ModelConfig, StoredWeights]:
    """Configuration and weights of a Hugging Face GPT-2 folder, in one file or in several with an index.

    Raises:
        InputError: the folder holds no GPT-2 that this trainer can express, or no safetensors.
    """
    try:
        config = from_hf_config(read_json(folder / "config.json"))
    except FileNotFoundError:
        raise InputError(f"{folder} is not a model folder: it has no config.json") from None
    except OSError as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dictionary
                header = tensors.get_slice(name)
                shape, is_conv1d = torch.Size(header.get_shape()), name.endswith(CONV1D)
                dtype = _DTYPES.get(header.get_dtype())
                read = partial(_read, file, name, is_conv1d)
                stored[name] = StoredTensor(name, shape[::-1] if is_conv1d else shape, dtype, read)
    if not config.bias and any(tensor.read().any() for tensor in stored.values() if _is_bias(tensor.name)):
        # Saved without biases, which Hugging Face then trained: it knows no model that has none.
        config = dataclasses.replace(config, bias=True)
    return config, StoredWeights(config, _in_our_names(config, stored), folder)


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [folder / Path(name).name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} cannot be read ({type(error).__name__}); copy it again") from None
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing, which {index.name} names; copy it too")
        return files
    if any(folder.glob("model-*.safetensors")):
        raise InputError(f"{index} is missing, which names the parts of the model; copy it too")
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder} holds its weights as pytorch_model.bin, a pickle, which can run any program and is not opened here; "
            "if you trust its maker, load it with transformers' from_pretrained and save it with save_pretrained"
        )
    raise InputError(f"{folder} has no model.safetensors; save the model with transformers' save_pretrained first")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged ({error}); copy it again") from None


def _read(file: Path, name: str, is_conv1d: bool) -> Tensor:
    # Opened for each tensor, so that its pages of the file leave memory with it.
    with _opened(file) as tensors:
        tensor = tensors.get_tensor(name)
    return tensor.t() if is_conv1d else tensor


def find_folder(name: str) -> Path:
    """A local folder as it is; any other name is looked up on the Hugging Face hub and downloaded into its cache.

    Every process of a host may call it at once: the hub's client locks each file, so that one process fetches it and the
    others wait for it and find it in the cache. That takes no collective, and so works before there is a runtime.

    Raises:
        InputError: there is neither such a folder nor, as far as can be seen from here, such a model.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import errors, snapshot_download

    hub_id = f"openai-community/{name}" if name in PRESETS else name
    elsewhere = "or give the path of a folder that holds the model"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except errors.HFValidationError:
        reason = "no such folder or file"
    except errors.GatedRepoError:
        reason = (
            f"{hub_id} is gated on the hub; ask for access on its page there and log in (hf auth login), {elsewhere}"
        )
    except errors.RepositoryNotFoundError:
        reason = (
            f"no such folder or file, and the hub has no model {hub_id}, or a private one; check the spelling, log in (hf "
            f"auth login), {elsewhere}"
        )
    except errors.LocalEntryNotFoundError as error:  # neither reached nor, whole, in the cache
        cause = error.__cause__
        if isinstance(cause, errors.OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set; unset it"
        elif isinstance(cause, errors.HfHubHTTPError):
            why = f"the hub answers with status {cause.response.status_code}; try again later"
        else:
            why = "the hub cannot be reached; check the network"
        reason = f"no such folder or file, {hub_id} is not whole in the hub's cache, and {why}, {elsewhere}"
    except OSError as error:
        reason = f"{hub_id} could not be downloaded ({str(error).splitlines()[0]}); try again, {elsewhere}"
    except Exception as error:  # the hub's client lets errors of its HTTP library through
        reason = f"{hub_id} could not be downloaded ({type(error).__name__}); check the network, {elsewhere}"
    raise InputError(f"{name}: {reason}")


def is_missing_path(name: str) -> bool:
    """Whether `name` is a path with nothing there: one that the hub could not know, or one into a folder that is here."""
    path = Path(name)
    if path.exists():
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return path.suffix == ".pt" or (path.parent != Path() and path.parent.is_dir())


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


def from_hf_config(values: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for a model that is not GPT-2, or a variant of it that `model.py` does not have."""
    if not isinstance(values, dict):
        raise ValueError("it holds no options")
    if values.get("model_type") != "gpt2":
        raise ValueError(f"model_type is {values.get('model_type')!r}, not 'gpt2'")
    for key, expected in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if values.get(key, expected) != expected:
            raise ValueError(f"{key} = {values[key]} is not supported")
    ours = {theirs: name for name, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu-tanh"}
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ours:
        raise ValueError(f"activation_function {activation!r} is not one of {', '.join(ours)}")
    try:
        padded = max(values["vocab_size"], values.get("gpt2xla_vocab_size", 0))
        config = ModelConfig(
            vocab_size=padded,
            vocab_padding=padded - values["vocab_size"],
            seq_length=values["n_positions"],
            d_model=values["n_embd"],
            num_layers=values["n_layer"],
            num_heads=values["n_head"],
            d_ff=values.get("n_inner") or 4 * values["n_embd"],
            dropout=values.get("resid_pdrop", 0.1),
            activation=ours[activation],  # type: ignore[arg-type]
            tie_weights=values.get("tie_word_embeddings", True),
            bias=values.get("gpt2xla_bias", True),
            layer_norm_eps=values.get("layer_norm_epsilon", 1e-5),
        )
        config.check()
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    except TypeError as error:
        raise ValueError(f"a size is not a number ({error})") from None
    return config


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
    ours = _in_our_names(config, state)
    return {name: tensor.t().contiguous() if name.endswith(CONV1D) else tensor for name, tensor in ours.items()}


def _in_our_names(config: ModelConfig, tensors: Mapping[str, T]) -> dict[str, T]:
    """OpenAI's own files leave out "transformer." and hold causal masks, which are no parameters."""
    out: dict[str, T] = {}
    for their_name, tensor in tensors.items():
        name = their_name.removeprefix("transformer.")
        is_tied_copy = name == "lm_head.weight" and config.tie_weights
        if not (_is_mask(name) or (_is_bias(name) and not config.bias) or is_tied_copy):
            out[name] = tensor
    return out


def _is_mask(name: str) -> bool:
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _is_bias(name: str) -> bool:
    return name.endswith(".bias") and not _is_mask(name)
