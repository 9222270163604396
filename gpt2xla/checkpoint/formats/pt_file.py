"""Reads models from files of torch.save, without unpickling objects.

Layouts: {model, optimizer, lr_scheduler, config, global_step} is common among GPT-2 reproductions; parameters have our names
or those of github.com/minhnguyent546/pre-training-gpt2. {model, optimizer, model_args, iter_num, best_val_loss, config} is
nanoGPT's `ckpt.pt` (github.com/karpathy/nanoGPT). {model, config, step, val_loss} is build-nanogpt's
(github.com/karpathy/build-nanogpt), whose config is a pickled `GPTConfig`. Weights alone need a `config.json` beside them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gpt2xla.checkpoint.formats.hf_config import read_config
from gpt2xla.checkpoint.formats.parameter_names import in_our_names, with_tied_head
from gpt2xla.checkpoint.formats.stored_weights import StoredWeights
from gpt2xla.checkpoint.formats.torch_file import PlainConfig, is_plain, load_plain, stored_tensors
from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError

_GPT_CONFIG = {
    "vocab_size": "vocab_size", "block_size": "seq_length", "n_embd": "d_model", "n_layer": "num_layers",
    "n_head": "num_heads", "dropout": "dropout", "bias": "bias",
}  # fmt: skip
_NANOGPT_NOTE = (
    "activation: gelu-exact, which nanoGPT uses since 2023-05-17; an older model has gelu-tanh: convert it with "
    'scripts/convert_checkpoint.py and write "activation_function": "gelu_new" into its config.json'
)
# Keys that identify a file that is not a model, and what it is.
_FOREIGN: tuple[tuple[set[str], str], ...] = (
    ({"step", "code", "model", "optimizers"}, "is modded-nanogpt's, whose model is not a GPT-2"),
    ({"module", "ds_version"}, "is a part of a DeepSpeed checkpoint; its own zero_to_fp32.py makes one file of it"),
    ({"state", "param_groups"}, "is an optimizer's state, not a model"),
    ({"optimizer", "runtime", "step"}, "is the training state of a checkpoint; give its folder"),
)  # fmt: skip


def load_pt_model(file: Path) -> tuple[ModelConfig, StoredWeights]:
    """Return the configuration and the weights, which stay on disk until they are used. Raises InputError if the file is
    damaged, holds objects other than tensors and plain values, or has another layout."""
    saved = load_plain(file, mapped=True)
    if not isinstance(saved, dict):
        raise InputError(f"{file} holds a {type(saved).__name__}, not a model; choose another file")
    for keys, sentence in _FOREIGN:
        if keys <= saved.keys():
            raise InputError(f"{file} {sentence}")
    state = _state(file, saved)
    config, notes = _configuration(file, saved)
    tensors = in_our_names(stored_tensors(state, file), file)
    if config.tie_weights:
        tensors = with_tied_head(tensors, file, "choose another file")
    return config, StoredWeights(config, tensors, file, notes)


def _state(file: Path, saved: dict[str, Any]) -> Any:
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(saved.get(key), dict):
            return saved[key]
    if saved and all(map(is_plain, saved.values())):
        return saved
    raise InputError(
        f"{file} has neither the layout {{model, optimizer, lr_scheduler, config, global_step}} nor nanoGPT's {{model, "
        "optimizer, model_args, iter_num, best_val_loss, config}, and is not a state_dict; choose another file"
    )


def _configuration(file: Path, saved: dict[str, Any]) -> tuple[ModelConfig, tuple[str, ...]]:
    arguments, config = saved.get("model_args"), saved.get("config")
    if isinstance(arguments, dict):
        return _of_gpt_config(file, arguments)
    if isinstance(config, PlainConfig):
        return _of_gpt_config(file, config.state)
    if isinstance(config, dict) and "model" in saved:
        values = {"layer_norm_eps" if key == "eps" else str(key): value for key, value in config.items()}
        if values.get("activation") == "gelu":  # in this layout, gelu means the tanh form
            values["activation"] = "gelu-tanh"
        return _our_config(file, values), ()
    if (file.parent / "config.json").is_file():
        return read_config(file.parent)
    what = "is a Lightning checkpoint, which" if "pytorch-lightning_version" in saved else "holds only weights, and"
    raise InputError(
        f"{file} {what} does not describe its model: weights do not show the number of heads or the activation; put the "
        "model's config.json, in Hugging Face's form, beside it"
    )


def _of_gpt_config(file: Path, values: Any) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read the fields of nanoGPT's GPTConfig, or build-nanogpt's and llm.c's, which have neither dropout nor bias.

    With biases as an option it is nanoGPT, which soon after switched to the exact GELU. All others have GPT-2's."""
    is_plain_config = isinstance(values, dict) and all(
        isinstance(value, bool | int | float) for value in values.values()
    )
    if not is_plain_config or (strange := [str(key) for key in values if key not in _GPT_CONFIG]):
        what = f"{strange[0][:80]}, which is not GPT-2's" if is_plain_config else "something other than plain numbers"
        raise InputError(f"{file}: its GPTConfig holds {what}; choose another file")
    options = {"bias": True} | {_GPT_CONFIG[key]: value for key, value in values.items()}
    is_exact = "bias" in values
    options["activation"] = "gelu-exact" if is_exact else "gelu-tanh"
    return _our_config(file, options), (_NANOGPT_NOTE,) if is_exact else ()


def _our_config(file: Path, values: dict[str, Any]) -> ModelConfig:
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if strange := [key for key in values if key not in known]:
        raise InputError(f"{file}: its config has {strange[0][:80]}, which is not GPT-2's; choose another file")
    try:
        config = ModelConfig(**values)
        config.check()
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: its config does not describe a supported GPT-2 ({error})") from None
    return config
