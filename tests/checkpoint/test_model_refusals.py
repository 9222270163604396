"""Model files that are not read: each is refused by its name, and nothing in them is run."""

import gzip
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here
from model_forms import BODY, BUILD, LINEAR, STATE, GPTConfig, config, in_parts, llmc, prefixed, pt, safetensors

from gpt2xla.checkpoint.loading import load_weights, locate
from gpt2xla.errors import InputError


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("was-run",)


def written(file: Path, contents: bytes) -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(contents)
    return file


def without_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder / "model.safetensors"


def archive(file: Path, name: str) -> Path:
    with zipfile.ZipFile(file, "w") as out:
        out.writestr(name, b"x")
    return file


def cut(file: Path, share: float = 0.5) -> Path:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    return file


def ints(*numbers: int) -> bytes:
    return struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
MIXED = prefixed("_orig_mod.", BODY) | {"lm_head.weight": STATE["lm_head.weight"]}
TWO = {f"{owner}.{name}": tensor for owner in ("ema", "model") for name, tensor in STATE.items()}
QUANTIZED = {"transformer.wte.weight": STATE["transformer.wte.weight"].to(torch.float8_e4m3fn)}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "LFS pointer, safetensors": (
        lambda f: written(config(f) / "model.safetensors", LFS).parent, "model.safetensors is a Git LFS pointer"),
    "LFS pointer, bin": (lambda f: written(config(f) / "pytorch_model.bin", LFS).parent, "is a Git LFS pointer"),
    "LFS pointer, pt": (lambda f: written(f / "x.pt", LFS), "is a Git LFS pointer"),
    "web page": (lambda f: written(f / "x.pt", b"\n<!DOCTYPE html><html>"), "is a web page"),
    "empty": (lambda f: written(f / "x.pt", b""), "is empty"),
    "zeros": (lambda f: written(f / "x.pt", bytes(5000)), "nothing but zeros"),
    "text": (lambda f: written(f / "x.pt", b"hello"), "not a known model file"),
    "gzip": (lambda f: written(f / "x.pt", gzip.compress(b"x" * 99)), "compressed with gzip"),
    "GGUF": (lambda f: written(f / "x.gguf", b"GGUF\3\0\0\0"), "is a GGUF model"),
    "HDF5": (lambda f: written(f / "tf_model.h5", b"\x89HDF\r\n\x1a\n"), "from_tf=True"),
    "Flax": (lambda f: written(f / "flax_model.msgpack", b"\x81\xabtransformer\x84"), "from_flax=True"),
    "npy": (lambda f: written(f / "x.bin", b"\x93NUMPY\1\0"), "is a .npy array"),
    "index": (lambda f: in_parts(f) / "pytorch_model.bin.index.json", "JSON text, not weights; give the folder"),
    "part": (lambda f: next(in_parts(f).glob("*-of-*")), "is one of the 2 parts of a model; give its folder"),
    "TensorFlow's part": (lambda f: written(f / "model.ckpt.data-00000-of-00001", b"abc"), "TensorFlow checkpoint"),
    "TorchScript": (lambda f: archive(f / "x.pt", "x/constants.pkl"), "TorchScript program"),
    "zip": (lambda f: archive(f / "x.pt", "readme.txt"), "zip archive that torch did not write"),
    "cut zip": (lambda f: cut(pt(f / "x.pt", BUILD | {"model": LINEAR})), "damaged or cut off"),
    "cut old": (lambda f: cut(pt(f / "x.pt", STATE, _use_new_zipfile_serialization=False)), "is damaged, or holds more"),
    "cut safetensors": (lambda f: cut(safetensors(f, BODY) / "model.safetensors").parent, "is damaged"),
    "cut llm.c": (lambda f: cut(llmc(f / "x.bin", LINEAR), 0.99), "bytes where its header says"),
    "long llm.c": (lambda f: written(f / "x.bin", llmc(f / "y.bin", LINEAR).read_bytes() + b"\0" * 4), "header says"),
    "llm.c version 1": (lambda f: llmc(f / "x.bin", LINEAR, version=1), "version 1 of llm.c's model files"),
    "llm.c header": (lambda f: written(f / "x.bin", ints(20240326, 3, -5, 61, 2, 3, 16, 61)), "its header is damaged"),
    "llm.c debug state": (lambda f: written(f / "x.bin", ints(20240327, 2)), "llm.c's debug state"),
    "llm.c optimizer": (lambda f: written(f / "x.bin", ints(20240527, 1)), "llm.c's optimizer state"),
    "llm.c tokens": (lambda f: written(f / "x.bin", ints(20240520, 1)), "llm.c's tokens"),
    "llm.c Llama": (lambda f: written(f / "x.bin", ints(20240803, 3)), "Llama 3"),
    "state_dict alone": (lambda f: pt(f / "x.pt", STATE), "put the model's config.json"),
    "safetensors alone": (lambda f: without_config(safetensors(f, BODY)), "no config.json beside it"),
    "Lightning": (
        lambda f: pt(f / "x.ckpt", {"pytorch-lightning_version": "2", "state_dict": STATE}), "is a Lightning checkpoint"),
    "Lightning, with classes": (
        lambda f: pt(f / "x.ckpt", {"pytorch-lightning_version": "2", "callbacks": Evil()}), "a Lightning checkpoint, it"),
    "modded-nanogpt": (
        lambda f: pt(f / "state_step001.pt", {"step": 1, "code": "", "model": STATE, "optimizers": []}), "modded-nanogpt"),
    "DeepSpeed": (lambda f: pt(f / "x.pt", {"module": STATE, "ds_version": "0.15"}), "zero_to_fp32.py"),
    "optimizer": (lambda f: pt(f / "optimizer.pt", {"state": {}, "param_groups": []}), "optimizer's state"),
    "a list": (lambda f: pt(f / "x.pt", [1]), "holds a list, not a model"),
    "a tensor": (lambda f: pt(f / "x.pt", torch.ones(3)), "holds a Tensor, not a model"),
    "numpy's numbers": (lambda f: pt(f / "x.pt", {"model": STATE, "loss": np.float64(3)}), "made by numpy"),
    "a whole module": (lambda f: pt(f / "x.pt", torch.nn.Linear(2, 2)), "made by torch.nn.modules.linear.Linear"),
    "mixed prefixes": (lambda f: safetensors(f, MIXED), "begin differently"),
    "two models": (lambda f: safetensors(f, TWO), "holds both ema."),
    "a name twice": (lambda f: safetensors(f, STATE | {"wte.weight": STATE["lm_head.weight"]}), "holds both"),
    "LoRA in names": (
        lambda f: safetensors(f, STATE | {"transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 16)}), "lora_A"),
    "float8": (lambda f: safetensors(f, BODY | QUANTIZED), "is of type F8_E4M3"),
    "adapter": (lambda f: written(safetensors(f, BODY) / "adapter_config.json", b"{}").parent, "PEFT adapter"),
    "DCP folder": (lambda f: written(f / "x" / "__0_0.distcp", b"x").parent, "dcp_to_torch"),
    "DeepSpeed folder": (
        lambda f: written(f / "global_step5" / "mp_rank_00_model_states.pt", b"x").parent.parent, "a DeepSpeed checkpoint"),
    "OpenAI's folder": (
        lambda f: written(f / "model.ckpt.index", b"x").parent, "TensorFlow checkpoint, as OpenAI published"),
    "TensorFlow folder": (lambda f: written(config(f) / "tf_model.h5", b"x").parent, "a TensorFlow model"),
    "Flax folder": (lambda f: written(config(f) / "flax_model.msgpack", b"x").parent, "a Flax model"),
    "GGUF folder": (lambda f: written(f / "x.gguf", b"x").parent, "a GGUF model"),
    "nanoGPT's out_dir": (lambda f: written(f / "ckpt.pt", b"x").parent, "give the file itself, such as"),
    "Trainer's folder": (lambda f: written(f / "checkpoint-5" / "config.json", b"{}").parent.parent, "checkpoint-5"),
    "nothing": (lambda f: f, "has no config.json; give the folder of a Hugging Face model"),
}  # fmt: skip


@pytest.mark.parametrize(("form", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("error")
def test_other_forms_are_refused_by_name(form: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    source = form(tmp_path)
    with pytest.raises(InputError) as error:
        load_weights(locate(str(source)))
    line = str(error.value)
    assert message in line
    assert str(tmp_path) in line
    assert not any(word in line for word in ("\n", "\x1b", "weights_only", "torch.load"))


class Called:
    """A GPTConfig that unpickling would make by a call with these arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple:
        return GPTConfig, *self.arguments


def odd(**values: Any) -> GPTConfig:
    made = GPTConfig()
    vars(made).update(values)
    return made


HOSTILE = {
    "a program": (Evil(), "made by posix.mkdir"),
    "a program in it": (odd(n_layer=Evil()), "made by posix.mkdir"),
    "a class in it": (odd(n_layer=pytest.approx), "made by _pytest"),
    "called with arguments": (Called((24, 61)), "is damaged, or holds more"),
    "built from a list": (Called((), [24, 61]), "other than plain numbers"),
    "built from slots": (Called((), (None, {"__class__": 5})), "other than plain numbers"),
    "nothing": (Called(()), "other than plain numbers"),
    "a list": (odd(n_layer=[2]), "other than plain numbers"),
    "text": (odd(n_head="2"), "other than plain numbers"),
    "a tensor": (odd(n_head=torch.tensor(2)), "other than plain numbers"),
    "another one": (odd(n_head=GPTConfig()), "other than plain numbers"),
    "a float": (odd(n_layer=2.5), "wrong kind"),
    "a huge number": (odd(n_layer=10**30), "wrong kind"),
    "negative": (odd(n_layer=-2), "--num-layers"),
    "more options": (odd(rotary=True), "rotary, which is not GPT-2's"),
    "__class__": (odd(__class__=1), "__class__, which is not GPT-2's"),
}


@pytest.mark.parametrize(("value", "message"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("old", [False, True])
def test_a_pickled_config_runs_nothing(
    value: Any, message: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = pt(tmp_path / "x.pt", BUILD | {"model": LINEAR, "config": value}, _use_new_zipfile_serialization=not old)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": value}, protocol=2))
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match="GPTConfig|nothing in it was run" if old else message):
        load_weights(file)
    with pytest.raises(InputError, match="nothing in it was run"):
        load_weights(tmp_path / "plain.pt")
    assert set(tmp_path.iterdir()) == before


def test_a_program_ends_in_one_line(tmp_path: Path) -> None:
    file = pt(tmp_path / "x.pt", {"model": Evil()})
    for program, flags in (
        ("generate.py", ["--model", file, "--prompt", "x"]),
        ("scripts/convert_checkpoint.py", ["--input", file, "--output-dir", tmp_path / "out"]),
    ):
        result = run_here(program, *flags)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert "made by posix.mkdir" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
