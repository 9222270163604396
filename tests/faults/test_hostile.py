"""Files from a stranger: whatever they hold, nothing of it is run, and what is wrong is one line that names the file.

Each case makes its file (a checkpoint's COMPLETE is signed anew, as a stranger would) and gives the command that opens it.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, prepare_documents, run

from gpt2xla.files import file_sha256
from gpt2xla.processes.exits import exit_code

DEEP = "[" * 100_000


@dataclass
class Scene:
    """Where a case lays its files: copies of whole ones, for it to spoil."""

    folder: Path
    checkpoint: Path  # of a run of 20 steps
    train: Path  # with a manifest
    valid: Path
    sentinel: Path  # made by whoever gets to run code

    def pretrain(self, *flags: object) -> list[str]:
        data = ["--train-dir", self.train, "--valid-dir", self.valid]
        small = ["--vocab-size", 257, "--seq-length", 16, "--d-model", 8, "--num-layers", 1, "--num-heads", 1]
        few = ["--train-steps", 1, "--train-batch-size", 2, "--gradient-accum-step", 1, "--valid-steps", 1]
        flags = (*data, *small, *few, "--checkpoints-dir", self.folder / "out", *flags)
        return ["run_pretrain.py", *map(str, flags)]

    def resume(self) -> list[str]:
        return ["run_pretrain.py", "--checkpoints-dir", str(self.folder / "out"), "--resume", str(self.checkpoint),
                "--train-steps", "21"]  # fmt: skip

    def load(self, source: Path) -> list[str]:
        return ["generate.py", "--model", str(source), "--prompt", "x", "--tokenizer", "bytes"]

    def evil(self, how: str = "system") -> object:
        return {
            "system": _Call(os.system, f"touch {self.sentinel}"),
            "exec": _Call(exec, f"open({str(self.sentinel)!r}, 'w')"),
            "popen": _Call(subprocess.Popen, ["touch", str(self.sentinel)]),
            "open": _Call(io.open, str(self.sentinel), "w"),
        }[how]


class _Call:
    """Unpickled, it is a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


CASES: dict[str, Callable[[Scene], tuple[list[str], str]]] = {}


def case(name: str, *arguments: object) -> Callable[[Callable], Callable]:
    def add(make: Callable) -> Callable:
        assert name not in CASES
        CASES[name] = lambda scene: make(scene, *arguments)
        return make

    return add


def sign(checkpoint: Path) -> None:
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != "COMPLETE"]
    entries = {
        file.relative_to(checkpoint).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in files
    }
    (checkpoint / "COMPLETE").write_text(signed({"step": 20, "files": entries}))


def signed(contents: object) -> str:
    """COMPLETE with the hash of its contents, where they can have one."""
    if isinstance(contents, dict):
        contents = {name: value for name, value in contents.items() if name != "sha256"}
        contents["sha256"] = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return json.dumps(contents)


# ---- pickles

FORMATS: dict[str, Callable[[object, Path], None]] = {
    "zip": torch.save,
    "legacy": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    "pickle": lambda value, file: file.write_bytes(pickle.dumps(value)),
    "pickle protocol 0": lambda value, file: file.write_bytes(pickle.dumps(value, protocol=0)),
}


def pickled(scene: Scene, format: str, how: str, layout: Callable[[object], object]) -> tuple[list[str], str]:
    file = scene.folder / "ckpt.pt"
    FORMATS[format](layout(scene.evil(how)), file)
    return scene.load(file), "ckpt.pt"


for format in FORMATS:
    for how in ("system", "exec", "popen", "open"):
        case(f"pt: {format}, {how}", format, how, lambda evil: evil)(pickled)
case("pt: in the model", "zip", "system", lambda evil: {"model": evil, "config": {}})(pickled)
case("pt: in the config", "zip", "system", lambda evil: {"model": {}, "config": evil})(pickled)
case("pt: in nanoGPT's arguments", "legacy", "exec", lambda evil: {"model": {}, "model_args": {"n_layer": evil}})(
    pickled
)


@case("pt: for training", "zip")
@case("pt: for training, legacy", "legacy")
def _(scene: Scene, format: str) -> tuple[list[str], str]:
    file = scene.folder / "ckpt.pt"
    FORMATS[format]({"model": {}, "optimizer": scene.evil(), "config": {}}, file)
    return scene.pretrain("--from-checkpoint", file), "ckpt.pt"


@case("pt: for conversion")
def _(scene: Scene) -> tuple[list[str], str]:
    torch.save(scene.evil(), scene.folder / "ckpt.pt")
    arguments = ["--input", str(scene.folder / "ckpt.pt"), "--output-dir", str(scene.folder / "out")]
    return ["scripts/convert_checkpoint.py", *arguments], "ckpt.pt"


def plain(scene: Scene, value: Callable[[], object]) -> tuple[list[str], str]:
    torch.save(value(), scene.folder / "ckpt.pt")
    return scene.load(scene.folder / "ckpt.pt"), "ckpt.pt"


SMALL = {"vocab_size": 257, "seq_length": 8, "d_model": 8, "num_layers": 1, "num_heads": 1, "bias": False}
SPARSE = torch.zeros(257, 8).to_sparse()
case("pt: a list", lambda: [1, 2])(plain)
case("pt: a tensor", lambda: torch.zeros(3))(plain)
case("pt: model of numbers", lambda: {"model": {1: 2}, "config": SMALL})(plain)
case("pt: sparse weights", lambda: {"model": {"wte.weight": SPARSE}, "config": SMALL})(plain)
case("pt: weights without numbers", lambda: {"model": {"wte.weight": torch.zeros(257, 8, device="meta")},
                                            "config": SMALL})(plain)  # fmt: skip
case("pt: sizes that are tensors", lambda: {"model": {}, "config": SMALL | {"d_model": torch.zeros(2)}})(plain)
case("pt: huge sizes", lambda: {"model": {}, "config": SMALL | {"num_layers": 10**9}})(plain)
case("pt: width beyond int64", lambda: {"model": {}, "config": SMALL | {"d_model": 10**30}})(plain)
case("pt: negative padding", lambda: {"model": {}, "config": SMALL | {"vocab_padding": -(10**6)}})(plain)


def broken_pickle(scene: Scene, contents: bytes) -> tuple[list[str], str]:
    (scene.folder / "ckpt.pt").write_bytes(contents)
    return scene.load(scene.folder / "ckpt.pt"), "ckpt.pt"


case("pt: empty", b"")(broken_pickle)
case("pt: stack underflow", b"\x80\x02.")(broken_pickle)
case("pt: unknown memo", b"\x80\x02h\xff.")(broken_pickle)
case("pt: a zip without pickles", b"PK\x05\x06" + bytes(18))(broken_pickle)
case("pt: marks without end", b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".")(broken_pickle)
case("pt: text", b"not a checkpoint")(broken_pickle)


@case("pytorch_model.bin")
def _(scene: Scene) -> tuple[list[str], str]:
    folder = scene.folder / "theirs"
    folder.mkdir()
    shutil.copy(scene.checkpoint / "config.json", folder)
    torch.save(scene.evil(), folder / "pytorch_model.bin")
    return scene.pretrain("--from-checkpoint", folder), "pytorch_model.bin"


@case("training state: zip", "zip")
@case("training state: legacy", "legacy")
@case("training state: pickle", "pickle")
def _(scene: Scene, format: str) -> tuple[list[str], str]:
    state = torch.load(scene.checkpoint / "training_state.pt", weights_only=True)
    FORMATS[format](state | {"data": scene.evil()}, scene.checkpoint / "training_state.pt")
    sign(scene.checkpoint)
    return scene.resume(), "training_state.pt"


def training_state(scene: Scene, change: Callable[[dict], object]) -> tuple[list[str], str]:
    state = torch.load(scene.checkpoint / "training_state.pt", weights_only=True)
    torch.save(change(state), scene.checkpoint / "training_state.pt")
    sign(scene.checkpoint)
    return scene.resume(), "training_state.pt"


def moments(state: dict, change: Callable[[torch.Tensor], object]) -> dict:
    averages = state["optimizer"]["exp_avg"]
    name = next(iter(averages))
    return state | {"optimizer": state["optimizer"] | {"exp_avg": averages | {name: change(averages[name])}}}


case("training state: a list", lambda state: [state])(training_state)
case("training state: nothing", lambda state: {})(training_state)
case("training state: NaN steps", lambda state: state | {"step": float("nan")})(training_state)
case("training state: infinite steps", lambda state: state | {"step": float("inf")})(training_state)
case("training state: steps before 0", lambda state: state | {"step": -1})(training_state)
case("training state: steps beyond int64", lambda state: state | {"step": 10**30})(training_state)
case("training state: updates that are text", lambda state: state | {"optimizer": state["optimizer"] | {"step": "2"}})(
    training_state
)
case("training state: no averages", lambda state: state | {"optimizer": {"step": 20}})(training_state)
case("training state: averages of text", lambda state: moments(state, lambda t: "x"))(training_state)
case("training state: complex averages", lambda state: moments(state, lambda t: t.to(torch.complex64)))(training_state)
case("training state: sparse averages", lambda state: moments(state, lambda t: t.to_sparse()))(training_state)
case("training state: averages without numbers", lambda state: moments(state, lambda t: t.to("meta")))(training_state)
case("training state: data of tensors", lambda state: state | {"data": {"--train-dir": torch.zeros(2)}})(training_state)
case("training state: runtime of text", lambda state: state | {"runtime": "x"})(training_state)
case("training state: wandb's id is a list", lambda state: state | {"wandb_id": ["x"]})(training_state)

# ---- shards


def shard(scene: Scene, contents: Callable[[Scene], bytes], name: str = "shard_000000.npy") -> tuple[list[str], str]:
    shutil.rmtree(scene.train)
    scene.train.mkdir()
    (scene.train / name).write_bytes(contents(scene))
    return scene.pretrain(), str(scene.train)


def npy(header: bytes, version: bytes = b"\x01\x00", data: bytes = bytes(4000)) -> bytes:
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + data


def described(descr: str = "'<u2'", shape: str = "(2000,)", order: str = "False") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode())


def array(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


case("npy: pickled objects", lambda scene: array(np.array([scene.evil()] * 3, dtype=object)))(shard)
case("npy: a pickle", lambda scene: pickle.dumps(scene.evil()))(shard)
case("npy: a zip of arrays", lambda scene: _npz(scene))(shard)
case("npy: objects by header", lambda scene: described("'|O'"))(shard)
case("npy: fields", lambda scene: described("[('a', '<u2'), ('b', '|O')]"))(shard)
case("npy: code for a header", lambda scene: npy(f"__import__('os').system('touch {scene.sentinel}')\n".encode()))(
    shard
)
case("npy: code for a type", lambda scene: described(f"__import__('os').system('touch {scene.sentinel}')"))(shard)
case("npy: deep header", lambda scene: npy(b"(" * 9_000 + b"\n"))(shard)
case("npy: deep signs", lambda scene: npy(b"-" * 9_000 + b"1\n"))(shard)
case("npy: header beyond the file", lambda scene: b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1))(shard)
case("npy: version 9", lambda scene: npy(b"{}", b"\x09\x00"))(shard)
case("npy: shape of 2^62", lambda scene: described(shape="(4611686018427387904,)"))(shard)
case("npy: shape beyond int64", lambda scene: described(shape="(10**30,)".replace("10**30", "1" + "0" * 30)))(shard)
case("npy: negative shape", lambda scene: described(shape="(-1,)"))(shard)
case("npy: shape of truths", lambda scene: described(shape="(True,)"))(shard)
case("npy: shape of text", lambda scene: described(shape="'x'"))(shard)
case("npy: no shape", lambda scene: described(shape="()"))(shard)
case("npy: fractions", lambda scene: described("'<f8'"))(shard)
case("npy: times", lambda scene: described("'<M8[s]'"))(shard)
case("npy: no bytes", lambda scene: b"")(shard)
case("npy: nothing in it", lambda scene: described(shape="(0,)"))(shard)
case("bin: negative tokens", lambda scene: np.array([20240520, 1, -5] + [0] * 253, "<i4").tobytes(), "train.bin")(shard)
case(
    "bin: 2^31 - 1 tokens", lambda scene: np.array([20240520, 1, 2**31 - 1] + [0] * 253, "<i4").tobytes(), "train.bin"
)(shard)
case("bin: half a header", lambda scene: np.array([20240520, 1, 5], "<i4").tobytes(), "train.bin")(shard)
case("bin: no bytes", lambda scene: b"", "train.bin")(shard)
case("bin: an odd byte", lambda scene: bytes(4001), "train.bin")(shard)


def _npz(scene: Scene) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.array([scene.evil()], dtype=object))
    return stream.getvalue()


def manifest(scene: Scene, change: Callable[[dict], object] | str) -> tuple[list[str], str]:
    file = scene.train / "manifest.json"
    values = json.loads(file.read_text())
    file.write_text(change if isinstance(change, str) else json.dumps(change(values)))
    return scene.pretrain(), str(scene.train)


def elsewhere(name: object) -> Callable[[dict], dict]:
    return lambda values: values | {"shards": [values["shards"][0] | {"file": name}]}


for name in ("../../x.npy", "/etc/passwd", "..", ".", "", "a/b.npy", "./shard_000000.npy", "x\0.npy", None, 5):
    case(f"manifest: shard {name!r}", elsewhere(name))(manifest)
case("manifest: deep", DEEP)(manifest)
case("manifest: no bytes", "")(manifest)
case("manifest: a list", lambda values: [values])(manifest)
case("manifest: null", "null")(manifest)
case("manifest: further entries", lambda values: values | {"__class__": "os.system"})(manifest)
case("manifest: NaN tokens", lambda values: values | {"tokens": float("nan")})(manifest)
case("manifest: infinite tokens", lambda values: values | {"tokens": float("inf")})(manifest)
case("manifest: negative tokens", lambda values: values | {"tokens": -1})(manifest)
case("manifest: a number of 5,000 digits", '{"tokens": ' + "9" * 5000 + "}")(manifest)
case("manifest: tokens beyond int64", lambda values: values | {"tokens": 10**30})(manifest)
case("manifest: no vocabulary", lambda values: values | {"vocab_size": 0})(manifest)
case("manifest: huge vocabulary", lambda values: values | {"vocab_size": 10**30})(manifest)
case("manifest: dtype of objects", lambda values: values | {"dtype": "object"})(manifest)
case("manifest: no shards", lambda values: values | {"shards": []})(manifest)
case("manifest: shards of text", lambda values: values | {"shards": "abc"})(manifest)
case("manifest: shards of nothing", lambda values: values | {"shards": None})(manifest)


@case("manifest: a link to elsewhere")
def _(scene: Scene) -> tuple[list[str], str]:
    first = min(scene.train.glob("*.npy"))
    first.unlink()
    first.symlink_to("/etc/passwd")
    return scene.pretrain(), first.name


@case("manifest: a link to itself")
def _(scene: Scene) -> tuple[list[str], str]:
    first = min(scene.train.glob("*.npy"))
    first.unlink()
    first.symlink_to(first)
    return scene.pretrain(), first.name


@case("manifest: a folder")
def _(scene: Scene) -> tuple[list[str], str]:
    (scene.train / "manifest.json").unlink()
    (scene.train / "manifest.json").mkdir()
    return scene.pretrain(), "manifest.json"


# ---- checkpoints


def complete(scene: Scene, change: Callable[[dict], object] | str) -> tuple[list[str], str]:
    file = scene.checkpoint / "COMPLETE"
    file.write_text(change if isinstance(change, str) else signed(change(json.loads(file.read_text()))))
    return scene.resume(), str(scene.checkpoint)


def names(name: str) -> Callable[[dict], dict]:
    return lambda values: values | {"files": values["files"] | {name: {"bytes": 1, "sha256": "0"}}}


case("COMPLETE: ../../x", names("../../x"))(complete)
case("COMPLETE: /etc/passwd", names("/etc/passwd"))(complete)
case("COMPLETE: a NUL", names("a\0b"))(complete)
case("COMPLETE: a name of 5,000 letters", names("x" * 5000))(complete)
case("COMPLETE: deep", DEEP)(complete)
case("COMPLETE: a list", lambda values: [])(complete)
case("COMPLETE: files of text", lambda values: {"files": "abc"})(complete)
case("COMPLETE: NaN bytes", lambda values: {"files": {"config.json": {"bytes": float("nan"), "sha256": "0"}}})(complete)


def model_config(scene: Scene, change: Callable[[dict], object] | str) -> tuple[list[str], str]:
    folder = scene.folder / "theirs"
    folder.mkdir()
    shutil.copy(scene.checkpoint / "model.safetensors", folder)
    values = json.loads((scene.checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(change if isinstance(change, str) else json.dumps(change(values)))
    return scene.pretrain("--from-checkpoint", folder), "theirs"


AUTO_MAP = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}, "trust_remote_code": True}
case("config.json: code of its own", lambda values: values | AUTO_MAP)(model_config)
case("config.json: deep", DEEP)(model_config)
case("config.json: no bytes", "")(model_config)
case("config.json: a list", lambda values: [values])(model_config)
case("config.json: a number of 5,000 digits", '{"n_layer": ' + "9" * 5000 + "}")(model_config)
case("config.json: a list for an activation", lambda values: values | {"activation_function": ["gelu_new"]})(
    model_config
)
HOSTILE_NUMBERS = (float("nan"), float("inf"), -1, 0, 10**9, 10**30, 10**400, "8", True, 8.5, [8], None, {"a": 1})
for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
    for number in HOSTILE_NUMBERS:
        text = repr(number) if len(repr(number)) < 11 else f"of {len(repr(number))} digits"
        case(f"config.json: {name} {text}", lambda values, name=name, number=number: values | {name: number})(
            model_config
        )
for name, number in (
    ("resid_pdrop", float("nan")), ("resid_pdrop", -1), ("resid_pdrop", "x"), ("layer_norm_epsilon", float("nan")),
    ("layer_norm_epsilon", -1e-5), ("layer_norm_epsilon", 10**400), ("n_inner", -5), ("n_inner", "x"), ("n_inner", 10**15),
    ("tie_word_embeddings", "no"), ("gpt2xla_bias", "no"), ("gpt2xla_vocab_size", 10**30), ("gpt2xla_vocab_size", "x"),
    ("gpt2xla_vocab_size", float("nan")),
):  # fmt: skip
    case(f"config.json: {name} {str(number)[:20]}", lambda values, name=name, number=number: values | {name: number})(
        model_config
    )


def run_config(scene: Scene, change: Callable[[dict], object] | str) -> tuple[list[str], str]:
    file = scene.checkpoint / "run_config.json"
    file.write_text(change if isinstance(change, str) else json.dumps(change(json.loads(file.read_text()))))
    sign(scene.checkpoint)
    return scene.resume(), "run_config.json"


case("run_config.json: deep", DEEP)(run_config)
case("run_config.json: a list", lambda values: [])(run_config)
for name, value in {
    "learning_rate": "x", "betas": [0.9, 0.95, 0.5], "seed": 10**400, "activation": "x", "mixed_precision": "int8",
    "train_dir": [1, 2], "valid_dir": None, "compile": "no", "valid_steps": "some", "optim_type": ["adam"],
    "attention": {"a": 1}, "matmul_precision": "exact", "gradient_accum_step": 1.5, "train_batch_size": True,
    "wandb_tags": 5, "max_grad_norm": float("nan"), "decay_steps": float("inf"), "tokenizer": "a\0b",
}.items():  # fmt: skip
    if name != "activation":  # the model is config.json's
        case(f"run_config.json: {name}", lambda values, name=name, value=value: values | {name: value})(run_config)


def safetensors(scene: Scene, contents: bytes | Callable[[dict, bytes], bytes]) -> tuple[list[str], str]:
    folder = scene.folder / "theirs"
    folder.mkdir()
    shutil.copy(scene.checkpoint / "config.json", folder)
    whole = (scene.checkpoint / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    if not isinstance(contents, bytes):
        contents = contents(json.loads(whole[8 : 8 + size]), whole[8 + size :])
    (folder / "model.safetensors").write_bytes(contents)
    return scene.pretrain("--from-checkpoint", folder), "theirs"


def header(values: object, data: bytes = b"") -> bytes:
    text = values.encode() if isinstance(values, str) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(**changes: object) -> Callable[[dict, bytes], bytes]:
    return lambda entries, data: header(
        entries | {"transformer.wte.weight": entries["transformer.wte.weight"] | changes}, data
    )


case("safetensors: no bytes", b"")(safetensors)
case("safetensors: header of 2^63", struct.pack("<Q", 2**63) + b"{}")(safetensors)
case("safetensors: header of 2^64 - 1", struct.pack("<Q", 2**64 - 1) + b"{}")(safetensors)
case("safetensors: header beyond the file", struct.pack("<Q", 10_000) + b"{}")(safetensors)
case("safetensors: deep header", header(DEEP))(safetensors)
case("safetensors: a list", header([]))(safetensors)
case("safetensors: a pickle", pickle.dumps({}))(safetensors)
case("safetensors: offsets beyond the file", tensor(data_offsets=[0, 2**40]))(safetensors)
case("safetensors: offsets turned round", tensor(data_offsets=[100, 0]))(safetensors)
case("safetensors: overlapping", tensor(data_offsets=[0, 257 * 8 * 4]))(safetensors)
case("safetensors: negative offsets", tensor(data_offsets=[-8, 8]))(safetensors)
case("safetensors: made-up type", tensor(dtype="F3"))(safetensors)
case("safetensors: another type", tensor(dtype="I32"))(safetensors)
case("safetensors: huge shape", tensor(shape=[2**62, 8]))(safetensors)
case("safetensors: shape that overflows", tensor(shape=[2**63, 2**63]))(safetensors)
case("safetensors: another shape", tensor(shape=[8, 97 * 4]))(safetensors)
case("safetensors: no tensors", header({}))(safetensors)


def index(scene: Scene, contents: object) -> tuple[list[str], str]:
    folder = scene.folder / "theirs"
    folder.mkdir()
    shutil.copy(scene.checkpoint / "config.json", folder)
    text = contents if isinstance(contents, str) else json.dumps(contents)
    (folder / "model.safetensors.index.json").write_text(text)
    return scene.pretrain("--from-checkpoint", folder), "theirs"


case("index: deep", DEEP)(index)
case("index: a list", [])(index)
case("index: ../", {"weight_map": {"transformer.wte.weight": "../checkpoint/model.safetensors"}})(index)
case("index: /etc/passwd", {"weight_map": {"transformer.wte.weight": "/etc/passwd"}})(index)
case("index: numbers", {"weight_map": {"transformer.wte.weight": 5}})(index)
case("index: a list of names", {"weight_map": {"transformer.wte.weight": ["a"]}})(index)
case("index: a NUL", {"weight_map": {"transformer.wte.weight": "a\0b"}})(index)
case("index: an empty name", {"weight_map": {"transformer.wte.weight": ""}})(index)
case("index: nothing", {"weight_map": {}})(index)


def tokenizer(scene: Scene, contents: object) -> tuple[list[str], str]:
    text = contents if isinstance(contents, str) else json.dumps(contents)
    (scene.folder / "tokenizer.json").write_text(text)
    return scene.pretrain("--tokenizer", scene.folder / "tokenizer.json"), "tokenizer"


def bpe(vocab: object, merges: object = ()) -> dict:
    return {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


case("tokenizer.json: deep", DEEP)(tokenizer)
case("tokenizer.json: no bytes", "")(tokenizer)
case("tokenizer.json: null", "null")(tokenizer)
case("tokenizer.json: a list", [])(tokenizer)
case("tokenizer.json: no words", bpe({}))(tokenizer)
case("tokenizer.json: negative ids", bpe({"a": -1}))(tokenizer)
case("tokenizer.json: id 2^32 - 1", bpe({"a": 2**32 - 1}))(tokenizer)
case("tokenizer.json: ids beyond int64", bpe({"a": 10**30}))(tokenizer)
case("tokenizer.json: merges of unknown words", bpe({"a": 0}, [["x", "y"]]))(tokenizer)
case("tokenizer.json: a word list", {"version": "1.0", "model": {"type": "WordLevel", "vocab": [1], "unk_token": 3}})(
    tokenizer
)


@case("tokenizer_config.json: deep", DEEP)
@case("tokenizer_config.json: a list", "[]")
@case(
    "tokenizer_config.json: strange values", json.dumps({"name_or_path": {"a": 1}, "eos_token": [[]], "bos_token": 7})
)
def _(scene: Scene, contents: str) -> tuple[list[str], str]:
    """It may lack altogether; with a vocabulary that does not fit, it is the vocabulary that is named."""
    folder = scene.folder / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(bpe({"a": 500})))
    (folder / "tokenizer_config.json").write_text(contents)
    return scene.pretrain("--tokenizer", folder), "okenizer"


# ---- configuration files

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


def yaml(scene: Scene, text: str) -> tuple[list[str], str]:
    (scene.folder / "run.yaml").write_text(text.replace("SENTINEL", str(scene.sentinel)), encoding="utf-8")
    culprit = "--tokenizer" if "tokenizer" in text else "run.yaml"
    return scene.pretrain("--config", scene.folder / "run.yaml"), culprit


case("yaml: a call", "seed: !!python/object/apply:os.system ['touch SENTINEL']")(yaml)
case("yaml: a process", "seed: !!python/object/apply:subprocess.Popen [['touch', 'SENTINEL']]")(yaml)
case("yaml: an object", '!!python/object/new:builtins.exec [\'open("SENTINEL", "w")\']')(yaml)
case("yaml: a module", "seed: !!python/module:antigravity")(yaml)
case("yaml: a name", "seed: !!python/name:os.system")(yaml)
case("yaml: a tag of its own", "seed: !evil 5")(yaml)
case("yaml: aliases by the billion", BOMB)(yaml)
case("yaml: a list that holds itself", "train_dir: &a [*a]")(yaml)
case("yaml: a mapping that holds itself", "&a\nseed: *a")(yaml)
case("yaml: deep", DEEP)(yaml)
case("yaml: deep mappings", "{a: " * 50_000)(yaml)
case("yaml: a 13th month", "seed: 2001-13-40")(yaml)
case("yaml: bytes", "seed: !!binary aGVsbG8=")(yaml)
case("yaml: a set", "seed: !!set {a, b}")(yaml)
case("yaml: a NUL in a name", 'tokenizer: "a\\0b"')(yaml)
case("yaml: half a character in a name", 'tokenizer: "\\ud800"')(yaml)
case("yaml: a number of 5,000 digits", "seed: " + "9" * 5000)(yaml)
case("yaml: a key that is a list", "? [a, b]\n: 5")(yaml)
case("yaml: two documents", "seed: 1\n---\nseed: 2\n")(yaml)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared documents and a run of 20 steps on them, for the cases to copy."""
    folder = tmp_path_factory.mktemp("whole")
    prepare_documents(folder / "data")
    flags = [*SMALL_RUN, "--vocab-size", 257, "--train-dir", folder / "data" / "train"]
    flags += ["--valid-dir", folder / "data" / "test", "--checkpoints-dir", folder / "run"]
    result = run("run_pretrain.py", *flags)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def scene(whole: Path, tmp_path: Path) -> Scene:
    shutil.copytree(whole / "data", tmp_path / "data")
    checkpoint = shutil.copytree(whole / "run" / "step-00000020", tmp_path / "checkpoint")
    return Scene(tmp_path, checkpoint, tmp_path / "data" / "train", tmp_path / "data" / "test", tmp_path / "sentinel")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def call(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The program's exit code, in this process; 1 for an error that it would print with its traceback."""
    main = importlib.import_module(argv[0].removesuffix(".py").replace("/", ".")).main
    monkeypatch.setattr(sys, "argv", argv)
    try:
        return exit_code(main)
    except Exception:
        traceback.print_exc()
        return 1


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_one_line(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, culprit = CASES[name](scene)
    code = call(argv, monkeypatch)
    error = capsys.readouterr().err
    assert not scene.sentinel.exists(), "it ran"
    assert "Traceback" not in error, error
    assert code == 2, error
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert re.match(r"[\w/]+\.py: error: ", lines[0])
    assert culprit in lines[0]
    assert len(lines[0]) < 1500
    assert not (scene.folder / "out").exists(), "nothing is written"


def test_the_files_are_good_before_they_are_spoilt(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sign(scene.checkpoint)
    assert call([*scene.resume(), "--train-dir", str(scene.train), "--valid-dir", str(scene.valid)], monkeypatch) == 0
    shutil.rmtree(scene.folder / "out")
    assert call(scene.pretrain(), monkeypatch) == 0
    assert call(scene.load(scene.checkpoint), monkeypatch) == 0


def test_a_folder_whose_name_is_no_text(scene: Scene) -> None:
    out = os.fsdecode(os.fsencode(scene.folder) + b"/\xff")
    result = run(*scene.pretrain("--checkpoints-dir", out), PYTHONIOENCODING="utf-8:strict")
    assert result.returncode == 0, result.stderr
    assert "\\udcff" in result.stdout


def test_what_these_pickles_do_if_they_are_let(scene: Scene) -> None:
    for how in ("system", "exec", "popen", "open"):
        result = pickle.loads(pickle.dumps(scene.evil(how)))
        if isinstance(result, subprocess.Popen):
            result.wait()
        assert scene.sentinel.exists(), how
        scene.sentinel.unlink()
