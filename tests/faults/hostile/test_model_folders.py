"""Checkpoint folders and Hugging Face folders: COMPLETE, configurations, weights and their index."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.hostile.conftest import Refused
from faults.hostile.scene import DEEP, Scene, changed, sign, signed

Change = Callable[[dict], Any] | str


def names(name: str) -> Change:
    return lambda values: values | {"files": values["files"] | {name: {"bytes": 1, "sha256": "0"}}}


COMPLETE: dict[str, Change] = {
    "../../x": names("../../x"),
    "/etc/passwd": names("/etc/passwd"),
    "a NUL": names("a\0b"),
    "a name of 5,000 letters": names("x" * 5000),
    "a name of 400 bytes": names("é" * 200),
    "deep": DEEP,
    "a list": lambda values: [],
    "files of text": lambda values: {"files": "abc"},
    "NaN bytes": lambda values: {"files": {"config.json": {"bytes": float("nan"), "sha256": "0"}}},
}
RUN_CONFIG: dict[str, object] = {
    "learning_rate": "x", "betas": [0.9, 0.95, 0.5], "seed": 10**400, "mixed_precision": "int8", "train_dir": [1, 2],
    "valid_dir": None, "compile": "no", "valid_steps": "some", "optim_type": ["adam"], "attention": {"a": 1},
    "matmul_precision": "exact", "gradient_accum_step": 1.5, "train_batch_size": True, "wandb_tags": 5,
    "max_grad_norm": float("nan"), "decay_steps": float("inf"), "tokenizer": "a\0b",
}  # fmt: skip


@pytest.mark.parametrize("change", COMPLETE)
def test_complete(change: str, scene: Scene, refused: Refused) -> None:
    file, change_to = scene.checkpoint / "COMPLETE", COMPLETE[change]
    file.write_text(change_to if isinstance(change_to, str) else signed(change_to(json.loads(file.read_text()))))
    refused(scene.resume(), str(scene.checkpoint))


@pytest.mark.parametrize("option", RUN_CONFIG)
def test_an_option_in_run_config_json(option: str, scene: Scene, refused: Refused) -> None:
    file = scene.checkpoint / "run_config.json"
    file.write_text(changed(file, lambda values: values | {option: RUN_CONFIG[option]}))
    sign(scene.checkpoint)
    refused(scene.resume(), "run_config.json")


@pytest.mark.parametrize("contents", [DEEP, "[]"], ids=["deep", "a list"])
def test_run_config_json(contents: str, scene: Scene, refused: Refused) -> None:
    (scene.checkpoint / "run_config.json").write_text(contents)
    sign(scene.checkpoint)
    refused(scene.resume(), "run_config.json")


def theirs(scene: Scene, copied: str) -> Path:
    """A model folder with one good file."""
    folder = scene.folder / "theirs"
    folder.mkdir()
    shutil.copy(scene.checkpoint / copied, folder)
    return folder


AUTO_MAP = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}, "trust_remote_code": True}
CONFIG: dict[str, Change] = {
    "its own code": lambda values: values | AUTO_MAP,
    "deep": DEEP,
    "no bytes": "",
    "a list": lambda values: [values],
    "a number of 5,000 digits": '{"n_layer": ' + "9" * 5000 + "}",
    "a list for an activation": lambda values: values | {"activation_function": ["gelu_new"]},
}
NUMBERS = (float("nan"), float("inf"), -1, 0, 10**9, 10**30, 10**400, "8", True, 8.5, [8], None, {"a": 1})
ENTRIES = [(name, value) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head") for value in NUMBERS] + [
    ("resid_pdrop", float("nan")), ("resid_pdrop", -1), ("resid_pdrop", "x"), ("layer_norm_epsilon", float("nan")),
    ("layer_norm_epsilon", -1e-5), ("layer_norm_epsilon", 10**400), ("n_inner", -5), ("n_inner", "x"), ("n_inner", 10**15),
    ("tie_word_embeddings", "no"), ("gpt2xla_bias", "no"), ("gpt2xla_vocab_size", 10**30), ("gpt2xla_vocab_size", "x"),
    ("gpt2xla_vocab_size", float("nan")),
]  # fmt: skip


def named(value: object) -> str:
    return repr(value) if len(repr(value)) < 32 else f"{len(repr(value))} digits"


@pytest.mark.parametrize("change", CONFIG)
def test_config_json(change: str, scene: Scene, refused: Refused) -> None:
    folder = theirs(scene, "model.safetensors")
    (folder / "config.json").write_text(changed(scene.checkpoint / "config.json", CONFIG[change]))
    refused(scene.pretrain("--from-checkpoint", folder), "theirs")


@pytest.mark.parametrize(("name", "value"), ENTRIES, ids=named)
def test_an_entry_of_config_json(name: str, value: object, scene: Scene, refused: Refused) -> None:
    folder = theirs(scene, "model.safetensors")
    text = changed(scene.checkpoint / "config.json", lambda values: values | {name: value})
    (folder / "config.json").write_text(text)
    refused(scene.pretrain("--from-checkpoint", folder), "theirs")


def header(values: object, data: bytes = b"") -> bytes:
    text = values.encode() if isinstance(values, str) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + data


BYTES = {
    "no bytes": b"",
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header beyond the file": struct.pack("<Q", 10_000) + b"{}",
    "deep header": header(DEEP),
    "a list": header([]),
    "a pickle": pickle.dumps({}),
    "no tensors": header({}),
}
TENSOR: dict[str, dict[str, object]] = {
    "offsets beyond the file": {"data_offsets": [0, 2**40]},
    "reversed offsets": {"data_offsets": [100, 0]},
    "overlapping": {"data_offsets": [0, 257 * 8 * 4]},
    "negative offsets": {"data_offsets": [-8, 8]},
    "made-up type": {"dtype": "F3"},
    "another type": {"dtype": "I32"},
    "huge shape": {"shape": [2**62, 8]},
    "shape that overflows": {"shape": [2**63, 2**63]},
    "another shape": {"shape": [8, 97 * 4]},
}


@pytest.mark.parametrize("contents", BYTES)
def test_safetensors(contents: str, scene: Scene, refused: Refused) -> None:
    folder = theirs(scene, "config.json")
    (folder / "model.safetensors").write_bytes(BYTES[contents])
    refused(scene.pretrain("--from-checkpoint", folder), "theirs")


@pytest.mark.parametrize("change", TENSOR)
def test_a_tensor_of_safetensors(change: str, scene: Scene, refused: Refused) -> None:
    folder = theirs(scene, "config.json")
    whole = (scene.checkpoint / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    entries = json.loads(whole[8 : 8 + size])
    entries["transformer.wte.weight"] |= TENSOR[change]
    (folder / "model.safetensors").write_bytes(header(entries, whole[8 + size :]))
    refused(scene.pretrain("--from-checkpoint", folder), "theirs")


INDEX: dict[str, object] = {
    "a list": [],
    "../": {"weight_map": {"transformer.wte.weight": "../checkpoint/model.safetensors"}},
    "/etc/passwd": {"weight_map": {"transformer.wte.weight": "/etc/passwd"}},
    "numbers": {"weight_map": {"transformer.wte.weight": 5}},
    "a list of names": {"weight_map": {"transformer.wte.weight": ["a"]}},
    "a NUL": {"weight_map": {"transformer.wte.weight": "a\0b"}},
    "an empty name": {"weight_map": {"transformer.wte.weight": ""}},
    "nothing": {"weight_map": {}},
}


@pytest.mark.parametrize("text", [DEEP, *map(json.dumps, INDEX.values())], ids=["deep", *INDEX])
def test_an_index(text: str, scene: Scene, refused: Refused) -> None:
    folder = theirs(scene, "config.json")
    (folder / "model.safetensors.index.json").write_text(text)
    refused(scene.pretrain("--from-checkpoint", folder), "theirs")
