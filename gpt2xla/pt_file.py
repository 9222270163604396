"""Weights from two kinds of `.pt` files, without unpickling objects.

{model, optimizer, lr_scheduler, config, global_step} is common among GPT-2 reproductions; the parameter names read here are
those of github.com/minhnguyent546/pre-training-gpt2, and ours. {model, optimizer, model_args, iter_num, best_val_loss,
config} is nanoGPT's `ckpt.pt` (github.com/karpathy/nanoGPT). Both keep matrices as nn.Linear does.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError
from gpt2xla.weights import StoredTensor, StoredWeights

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
    ("transformer.", ""),
)
_NANOGPT_ARGUMENTS = {
    "vocab_size": "vocab_size", "block_size": "seq_length", "n_embd": "d_model", "n_layer": "num_layers",
    "n_head": "num_heads", "dropout": "dropout", "bias": "bias",
}  # fmt: skip


def load_pt_model(file: Path) -> tuple[ModelConfig, StoredWeights]:
    """Configuration and weights; tensors are mapped, and read when they are asked for.

    Raises:
        InputError: the file is damaged, holds objects other than tensors and plain values, or has another layout.
    """
    saved = load_plain(file, mapped=True)
    state, values = (saved.get("model"), _our_options(saved)) if isinstance(saved, dict) else (None, None)
    if not isinstance(state, dict) or values is None:
        raise InputError(
            f"{file} is neither in the layout {{model, optimizer, lr_scheduler, config, global_step}} nor in nanoGPT's "
            "{model, optimizer, model_args, iter_num, best_val_loss, config}"
        )
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not is_plain(tensor):
            raise InputError(f"{file}: {name!r} among the model's weights is no tensor; choose another file")
        if not name.endswith(("causal_mask", ".attn.bias", ".attn.masked_bias")):
            tensors[_our_name(name)] = StoredTensor(name, tensor.shape, tensor.dtype, tensor.detach)
    config = _our_config(file, values)
    if config.tie_weights and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if "wte.weight" in tensors and not _same(head.read(), tensors["wte.weight"].read()):
            raise InputError(
                f"{file}: {head.name} is not the token embedding, though by its configuration they are one; choose "
                "another file"
            )
    return config, StoredWeights(config, tensors, file)


def load_plain(file: Path, mapped: bool = False) -> Any:
    """Tensors and plain values; with `mapped`, tensors stay on disk until they are used, where the format allows.

    Raises:
        InputError: the file is damaged, or would make objects of another kind: none is made.
    """
    try:
        mapped &= zipfile.is_zipfile(file)  # torch's older format has to be read whole
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken pickle can make the reader raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file} cannot be loaded as plain tensors ({reason}); nothing in it was run") from None


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor whose numbers are there: not sparse, not a shape without numbers."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _our_name(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name


def _our_options(saved: dict[str, Any]) -> dict[str, Any] | None:
    """Of ModelConfig; None if the file is in neither layout."""
    if isinstance(arguments := saved.get("model_args"), dict):
        values = _renamed(arguments, _NANOGPT_ARGUMENTS)
        # Its GELU is the exact one, also for models that began as OpenAI's. Files that leave out `bias` are from before
        # that was an option.
        return {"bias": True, **values, "activation": "gelu-exact"}
    if not isinstance(config := saved.get("config"), dict):
        return None
    values = _renamed(config, {"eps": "layer_norm_eps"})
    if values.get("activation") == "gelu":  # there, gelu means the tanh form
        values["activation"] = "gelu-tanh"
    return values


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {str(names.get(key, key)): value for key, value in values.items()}


def _our_config(file: Path, values: dict[str, Any]) -> ModelConfig:
    try:
        config = ModelConfig(**values)
        config.check()
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: its config does not describe a GPT-2 of ours ({error})") from None
    return config
