"""One small GPT-2 of transformers, and writers for the files in which people keep such a model."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.formats.parameter_names import CONV1D

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
IDS = torch.arange(40).view(2, 20)


def model(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**SIZES, **options, bos_token_id=60, eos_token_id=60)).eval()
    with torch.no_grad():  # so that no bias is 0 and no norm 1
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return theirs


THEIRS = model()
STATE = {name: tensor.contiguous() for name, tensor in THEIRS.state_dict().items()}
BODY = {name: tensor for name, tensor in STATE.items() if name != "lm_head.weight"}
LINEAR = {name: tensor.t().contiguous() if name.endswith(CONV1D) else tensor for name, tensor in STATE.items()}


@dataclasses.dataclass
class GPTConfig:
    """The configuration of build-nanogpt's train_gpt2.py."""

    block_size: int = 24
    vocab_size: int = 61
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16


# Pickled as a class of a script, as build-nanogpt's is.
GPTConfig.__module__ = "__main__"
sys.modules["__main__"].GPTConfig = GPTConfig  # type: ignore[attr-defined]


def config(folder: Path, **changes: Any) -> Path:
    THEIRS.config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def safetensors(folder: Path, state: dict[str, Tensor], name: str = "model.safetensors", **changes: Any) -> Path:
    save_file({key: tensor.clone() for key, tensor in state.items()}, config(folder, **changes) / name)
    return folder


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def pt(file: Path, contents: Any, **options: Any) -> Path:
    torch.save(contents, file, **options)
    return file


def llmc(file: Path, state: dict[str, Tensor], version: int = 3, rows: int = 128) -> Path:
    """Write what `write_model` of llm.c's train_gpt2.py writes."""
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, version, 24, 61, 2, 2, 16, rows
    names = [
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
        "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ]  # fmt: skip
    order = ["wte.weight", "wpe.weight", *[f"h.{layer}.{name}" for name in names for layer in range(2)]]
    with file.open("wb") as out:
        out.write(header.tobytes())
        for name in [*order, "ln_f.weight", "ln_f.bias"]:
            tensor = state[f"transformer.{name}"]
            if name == "wte.weight":
                tensor = torch.cat([tensor, tensor.new_zeros(rows - 61, 16)])
            out.write((tensor if version == 3 else tensor.bfloat16().view(torch.int16)).numpy().tobytes())
    return file


def in_parts(folder: Path) -> Path:
    halves = list(STATE)[:10], list(STATE)[10:]
    names = {}
    for number, half in enumerate(halves, start=1):
        part = f"pytorch_model-{number:05d}-of-00002.bin"
        pt(folder / part, {name: STATE[name] for name in half})
        names |= dict.fromkeys(half, part)
    (config(folder) / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def kept_by_save_model(folder: Path, dropped: str) -> Path:
    save_model(THEIRS, str(config(folder) / "model.safetensors"))
    state = load_file(folder / "model.safetensors")
    (kept,) = {"lm_head.weight", "transformer.wte.weight"} & state.keys()
    if kept == dropped:
        other = "lm_head.weight" if kept != "lm_head.weight" else "transformer.wte.weight"
        state[other] = state.pop(kept)
        save_file(state, folder / "model.safetensors")
    return folder


FSDP = {
    "_fsdp_wrapped_module."
    + name.replace("h.0.", "h.0._fsdp_wrapped_module.").replace("h.1.", "h.1._orig_mod."): tensor
    for name, tensor in STATE.items()
}
NANOGPT = {"model_args": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 61, "dropout": 0.1}}
BUILD = {"config": GPTConfig(), "step": 5, "val_loss": 3.0}
