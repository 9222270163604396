"""Weights from `.pt` files in the layout {model, optimizer, lr_scheduler, config, global_step}, without unpickling objects.

That layout is common among GPT-2 reproductions; the parameter names read here are those of
github.com/minhnguyent546/pre-training-gpt2, and ours.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError

_RENAMED = (
    ("_orig_mod.", ""),
    ("module.", ""),
    ("token_embedding.", "wte."),
    ("positional_embedding.", "wpe."),
    ("decoder_blocks.", "h."),
    ("causal_self_attention.w_qkv.", "attn.c_attn."),
    ("causal_self_attention.rl_projection.", "attn.c_proj."),
    ("position_wise_ffn.linear.", "mlp.c_fc."),
    ("position_wise_ffn.rl_projection.", "mlp.c_proj."),
    ("layer_norm_1.", "ln_1."),
    ("layer_norm_2.", "ln_2."),
    ("layer_norm.", "ln_f."),
)


def load_pt_model(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights (on the CPU, in our names).

    Raises:
        InputError: the file is damaged, holds objects other than tensors and plain values, or has another layout.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file} cannot be loaded as plain tensors ({reason}); nothing in it was run") from None
    if (
        not isinstance(saved, dict)
        or not isinstance(saved.get("model"), dict)
        or not isinstance(saved.get("config"), dict)
    ):
        raise InputError(f"{file} is not in the layout {{model, optimizer, lr_scheduler, config, global_step}}")
    state = {_our_name(name): tensor for name, tensor in saved["model"].items() if not name.endswith("causal_mask")}
    config = _our_config(file, saved["config"])
    if config.tie_weights:
        state.pop("lm_head.weight", None)
    return config, state


def _our_name(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name


def _our_config(file: Path, values: dict[str, Any]) -> ModelConfig:
    renamed = {"eps": "layer_norm_eps"}
    values = {renamed.get(key, key): value for key, value in values.items()}
    if values.get("activation") == "gelu":  # there, gelu means the tanh form
        values["activation"] = "gelu-tanh"
    try:
        config = ModelConfig(**values)
        config.check()
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: its config does not describe a GPT-2 of ours ({error})") from None
    return config
