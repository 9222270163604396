"""Hugging Face GPT-2 folders in and out: configuration, parameter names and layouts, both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2xla.config import PRESETS, ModelConfig
from gpt2xla.errors import InputError

ACTIVATIONS = {"gelu-tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
# Hugging Face's GPT-2 keeps these as Conv1D: (in, out) where nn.Linear has (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def save_model(folder: Path, config: ModelConfig, state: dict[str, Tensor], eot_id: int | None) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`, as `GPT2LMHeadModel` reads them."""
    values = to_hf_config(config, eot_id)
    generation = {"bos_token_id": eot_id, "eos_token_id": eot_id, "do_sample": True}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_file(to_hf_state(config, state), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors shuts out other users


def load_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights (on the CPU, in our names) of a Hugging Face GPT-2 folder.

    Raises:
        InputError: the folder holds no GPT-2 that this trainer can express, or no safetensors.
    """
    try:
        config = from_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{folder} is not a model folder: it has no config.json") from None
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no model.safetensors; save the model with transformers' save_pretrained first")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is damaged ({error}); copy it again") from None
    return config, from_hf_state(config, state)


def find_folder(name: str) -> Path:
    """A local folder as it is; any other name is looked up on the Hugging Face hub and downloaded into its cache.

    Raises:
        InputError: there is neither such a folder nor, as far as can be seen from here, such a model.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    hub_id = f"openai-community/{name}" if name in PRESETS else name
    wanted = ["config.json", "model*.safetensors", "tokenizer.json", "tokenizer_config.json"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except HFValidationError:
        raise InputError(f"{name}: no such folder or file") from None
    except Exception as error:  # the hub client lets errors of several HTTP libraries through
        raise InputError(
            f"{name}: no such folder here, and {hub_id} could not be had from the hub ({type(error).__name__}); check the "
            "name and the network, or give the path of a downloaded folder"
        ) from None


def to_hf_config(config: ModelConfig, eot_id: int | None) -> dict[str, Any]:
    """The contents of `config.json`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
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
        "gpt2xla_bias": config.bias,
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
    if activation not in ours:
        raise ValueError(f"activation_function {activation!r} is not one of {', '.join(ours)}")
    try:
        config = ModelConfig(
            vocab_size=values["vocab_size"],
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


def to_hf_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights in Hugging Face's names and layouts. Absent biases become zeros, which compute the same."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        their_name = name if name.startswith("lm_head") else f"transformer.{name}"
        out[their_name] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor.contiguous()
        module = name.removesuffix(".weight")
        if not config.bias and module.rsplit(".")[-1] not in ("wte", "wpe", "lm_head"):
            out[f"transformer.{module}.bias"] = tensor.new_zeros(tensor.shape[0])
    return out


def from_hf_state(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse. OpenAI's own files leave out "transformer." and hold causal masks, which are no parameters."""
    out: dict[str, Tensor] = {}
    for their_name, tensor in state.items():
        name = their_name.removeprefix("transformer.")
        is_mask = name.endswith((".attn.bias", ".attn.masked_bias"))
        is_absent_bias = name.endswith(".bias") and not config.bias
        is_tied_copy = name == "lm_head.weight" and config.tie_weights
        if not (is_mask or is_absent_bias or is_tied_copy):
            out[name] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor
    return out
