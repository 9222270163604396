"""Converts between our parameter names and layout and those of other GPT-2s, whatever the model was wrapped in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gpt2xla.checkpoint.formats.stored_weights import StoredTensor
from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError

# Hugging Face's GPT-2 stores these as Conv1D: (in, out), while nn.Linear has (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# The names in github.com/minhnguyent546/pre-training-gpt2.
_RENAMED = {
    "token_embedding.": "wte.",
    "positional_embedding.": "wpe.",
    "decoder_blocks.": "h.",
    "causal_self_attention.w_qkv.": "attn.c_attn.",
    "causal_self_attention.rl_projection.": "attn.c_proj.",
    "causal_self_attention.causal_mask": "attn.bias",
    "position_wise_ffn.linear.": "mlp.c_fc.",
    "position_wise_ffn.rl_projection.": "mlp.c_proj.",
    "layer_norm_1.": "ln_1.",
    "layer_norm_2.": "ln_2.",
    "layer_norm.": "ln_f.",
}
_THEIRS = re.compile("|".join(rf"(?<![^.]){re.escape(name)}" for name in _RENAMED))
# One of our names after the prefix of any wrapper: "_orig_mod." of torch.compile, "module." of DDP, "model." of Lightning,
# "transformer." of Hugging Face and nanoGPT, ...
_WRAPPED = re.compile(r"(?P<prefix>(?:[^.]+\.)*?)(?P<name>(?:wte|wpe|ln_f|lm_head)\.[^.]+|h\.\d+\..+)")
# These may also wrap a single block.
_INSIDE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def in_our_names(tensors: Mapping[str, StoredTensor], source: Path) -> dict[str, StoredTensor]:
    """Return the tensors by our names, matrices in the layout of nn.Linear, without causal masks. Unknown names stay. Raises
    InputError if the tensors have different prefixes, and so may not belong to one model."""
    out: dict[str, StoredTensor] = {}
    bodies: dict[str, str] = {}  # each prefix, and a tensor that has it
    heads: dict[str, str] = {}  # the same for lm_head, which Hugging Face has beside "transformer.", not in it
    for their_name, tensor in tensors.items():
        match = _WRAPPED.fullmatch(_THEIRS.sub(lambda found: _RENAMED[found[0]], their_name))
        if match is None:
            out[their_name] = tensor
            continue
        prefix, name = match["prefix"], _INSIDE.sub("", match["name"])
        if is_mask(name):
            continue
        (heads if name.startswith("lm_head.") else bodies).setdefault(prefix, their_name)
        if name in out:
            raise InputError(f"{source} holds both {out[name].name} and {their_name}; keep one of them")
        out[name] = tensor
    fitting = {end for prefix in bodies for end in (prefix, prefix.removesuffix("transformer."))}
    strangers = list(bodies.values())[1:] + [name for prefix, name in heads.items() if prefix not in fitting]
    if bodies and strangers:
        raise InputError(
            f"{source} holds {next(iter(bodies.values()))} and {strangers[0]}: their names begin differently, so they may "
            "belong to different models; keep the tensors of one model, with one prefix"
        )
    return _as_linear(out)


def _as_linear(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Transpose Conv1D's matrices. c_attn shows the layout, being (D, 3 D) in Conv1D; other matrices may be square."""
    shapes = [tensor.shape for name, tensor in tensors.items() if name.endswith("attn.c_attn.weight")]
    if not any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes):
        return tensors
    return {name: tensor.transposed() if name.endswith(CONV1D) else tensor for name, tensor in tensors.items()}


def with_tied_head(tensors: dict[str, StoredTensor], source: Path, fix: str) -> dict[str, StoredTensor]:
    """Return the tensors without lm_head, for a model whose head is its token embedding. A file may have either or both.
    Raises InputError if both are present and differ; `fix` says what to do."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if head is None:
        return tensors
    if embedding is not None and not _same(head.read(), embedding.read()):
        raise InputError(
            f"{source}: {head.name} is not the token embedding {embedding.name}, although its configuration ties them; {fix}"
        )
    others = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return {"wte.weight": head} | others


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        a, b = (tensor.to(torch.promote_types(a.dtype, b.dtype)) for tensor in (a, b))
    # NaN is not equal to itself, but its bytes are.
    return torch.equal(a, b) or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def to_hf_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights in Hugging Face's names and layouts, without the padding of the vocabulary. Missing biases become
    zeros, which compute the same."""
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


def is_mask(name: str) -> bool:
    """Tell whether a tensor is a causal mask, which some versions store beside the parameters."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def is_bias(name: str) -> bool:
    """Tell whether a tensor is a bias; a mask may have the same ending."""
    return name.endswith(".bias") and not is_mask(name)
