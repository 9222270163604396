"""Converts between ModelConfig and a Hugging Face GPT-2's `config.json`, read as transformers' GPT2Config reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError
from gpt2xla.files import read_json

# GPT2Config.attribute_map: if both names are given, transformers takes these.
_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "gpt2xla_bias": True, "gpt2xla_vocab_size": 0,
}  # fmt: skip
# transformers writes GPT-2's tanh form in five ways and the exact GELU in two.
_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu-tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu-exact"),
    "relu": "relu",
}
_THEIR_ACTIVATIONS = {"gelu-tanh": "gelu_new", "gelu-exact": "gelu", "relu": "relu"}
# Keys that may change the model's function, and the values that do not.
_OTHER_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "pruned_heads": ({}, None),
}


def read_config(folder: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the configuration in the folder's `config.json`, and lines for the user about differences to it. Raises
    InputError if there is no `config.json`, or its model is not a GPT-2 that `gpt2.py` supports."""
    file = folder / "config.json"
    try:
        values = read_json(file)
        return from_hf_config(values), _notes(values)
    except FileNotFoundError:
        raise InputError(f"{folder} is not a model folder: it has no config.json") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def from_hf_config(values: dict[str, Any]) -> ModelConfig:
    """Return the configuration that these values describe. Raises ValueError unless `gpt2.py` supports such a model."""
    if not isinstance(values, dict):
        raise ValueError("it holds no options")
    _refuse_other_models(values)
    found = _DEFAULTS | values | {ours: values[name] for name, ours in _OTHER_NAMES.items() if name in values}
    activation, width, vocab_size = (found[key] for key in ("activation_function", "n_embd", "vocab_size"))
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"activation_function {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    if found["n_inner"] == 0:
        raise ValueError("n_inner is 0, which leaves the feed-forward layers empty")
    try:
        padded = max(vocab_size, found["gpt2xla_vocab_size"])
        config = ModelConfig(
            vocab_size=padded,
            vocab_padding=padded - vocab_size,
            seq_length=found["n_positions"],
            d_model=width,
            num_layers=found["n_layer"],
            num_heads=found["n_head"],
            d_ff=4 * width if found["n_inner"] is None else found["n_inner"],
            dropout=found["resid_pdrop"],
            activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
            tie_weights=found["tie_word_embeddings"],
            bias=found["gpt2xla_bias"],
            layer_norm_eps=found["layer_norm_epsilon"],
        )
        config.check()
    except TypeError as error:
        raise ValueError(f"a size is not a number ({error})") from None
    return config


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of `config.json`, without ids of special tokens. Hugging Face keeps keys that it does not know."""
    padding = {"gpt2xla_vocab_size": config.vocab_size} if config.vocab_padding else {}
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
        "activation_function": _THEIR_ACTIVATIONS[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_weights,
        "torch_dtype": "float32",
        "gpt2xla_bias": config.bias,
        **padding,
    }


def _refuse_other_models(values: dict[str, Any]) -> None:
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError("architectures is not a list")
    names = [str(name).removeprefix("TF").removeprefix("Flax") for name in architectures]
    if kind is None and not any(name.startswith("GPT2") for name in names):
        raise ValueError('model_type is missing; if it is a GPT-2, add "model_type": "gpt2"')
    if kind not in ("gpt2", None):
        raise ValueError(f"model_type is {kind!r}, not 'gpt2'")
    if names and not {"GPT2LMHeadModel", "GPT2Model"} & set(names):
        raise ValueError(
            f"its architecture is {', '.join(names)}, not GPT2LMHeadModel; to use its language model, load it with "
            "GPT2LMHeadModel.from_pretrained and save it with save_pretrained"
        )
    if values.get("quantization_config") is not None:
        raise ValueError("its weights are quantized (quantization_config); use the original model")
    for key, harmless in _OTHER_FUNCTIONS.items():
        if key in values and values[key] not in harmless:
            raise ValueError(f"{key} = {values[key]} is not supported")


def _notes(values: dict[str, Any]) -> tuple[str, ...]:
    dropout = values.get("resid_pdrop", 0.1)
    others = [key for key in ("embd_pdrop", "attn_pdrop") if values.get(key, 0.1) != dropout]
    if not others:
        return ()
    differing = " and ".join(f"{key} {values.get(key, 0.1)}" for key in others)
    return (f"dropout: {dropout} everywhere (resid_pdrop), where config.json has {differing}",)
