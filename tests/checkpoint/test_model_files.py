"""Models in the forms that people have them: each computes what transformers computes, or is refused by its name."""

import dataclasses
import gzip
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.convert import convert
from gpt2xla.checkpoint.formats.parameter_names import CONV1D
from gpt2xla.checkpoint.loading import build_model, load_weights, locate
from gpt2xla.errors import InputError

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
    """As build-nanogpt's train_gpt2.py has it."""

    block_size: int = 24
    vocab_size: int = 61
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16


@pytest.fixture(autouse=True)
def pickled_by_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    monkeypatch.setattr(GPTConfig, "__module__", "__main__")


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
    """As `write_model` of llm.c's train_gpt2.py does."""
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

FORMS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda folder: safetensors(folder, BODY),
    "head and embedding, equal": lambda folder: safetensors(folder, STATE),
    "save_model: the embedding alone": lambda folder: kept_by_save_model(folder, "lm_head.weight"),
    "save_model: the head alone": lambda folder: kept_by_save_model(folder, "transformer.wte.weight"),
    "no prefix": lambda folder: safetensors(folder, {n.removeprefix("transformer."): t for n, t in BODY.items()}),
    "no prefix, and a head": lambda folder: safetensors(
        folder, {n.removeprefix("transformer."): t for n, t in STATE.items()}
    ),
    "masks": lambda folder: safetensors(folder, STATE | {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24)}),
    **{
        f"safetensors, {prefix}": lambda folder, prefix=prefix: safetensors(folder, prefixed(prefix))
        for prefix in (
            "_orig_mod.", "module.", "model.", "transformer.", "_forward_module.", "_fsdp_wrapped_module.",
            "module._orig_mod.", "_orig_mod.module.", "_forward_module.model._orig_mod.",
        )
    },
    "FSDP, blocks wrapped too": lambda folder: safetensors(folder, FSDP),
    "GPT2Model": lambda folder: safetensors(folder, BODY, architectures=["GPT2Model"]),
    "as nn.Linear has it": lambda folder: safetensors(folder, LINEAR),
    "a file of another name": lambda folder: safetensors(folder, BODY, "gpt2-mine.safetensors") / "gpt2-mine.safetensors",
    "model.safetensors itself": lambda folder: safetensors(folder, BODY) / "model.safetensors",
    "safetensors called .pt": lambda folder: safetensors(folder, BODY, "x.pt") / "x.pt",
    "pytorch_model.bin": lambda folder: pt(config(folder) / "pytorch_model.bin", STATE).parent,
    "pytorch_model.bin, module.": lambda folder: pt(config(folder) / "pytorch_model.bin", prefixed("module.")).parent,
    "pytorch_model.bin of old": lambda folder: pt(
        config(folder) / "pytorch_model.bin", STATE, _use_new_zipfile_serialization=False
    ).parent,
    "pytorch_model.bin in parts": in_parts,
    "torch.save's called model.safetensors": lambda folder: pt(config(folder) / "model.safetensors", STATE).parent,
    "a state_dict beside config.json": lambda folder: pt(config(folder) / "weights.pth", STATE),
    "Lightning beside config.json": lambda folder: pt(
        config(folder) / "last.ckpt", {"pytorch-lightning_version": "2.5", "state_dict": prefixed("model.")}
    ),
    "build-nanogpt": lambda folder: pt(folder / "model_05000.pt", BUILD | {"model": LINEAR}),
    "build-nanogpt, compiled": lambda folder: pt(folder / "x.pt", BUILD | {"model": prefixed("_orig_mod.", LINEAR)}),
    "nanoGPT of 2022": lambda folder: pt(folder / "ckpt.pt", NANOGPT | {"model": LINEAR, "config": {"bias": 1}}),
    "llm.c": lambda folder: llmc(folder / "gpt2_124M.bin", LINEAR),
    "llm.c without padding": lambda folder: llmc(folder / "gpt2_124M.bin", LINEAR, rows=61),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form_is_the_same_model(form: Callable[[Path], Path], tmp_path: Path) -> None:
    source = form(tmp_path)
    read_config, weights = load_weights(locate(str(source)))
    assert weights.notes == ()
    assert all(torch.equal(weights[name], LINEAR[f"transformer.{name}"]) for name in weights)
    ours = build_model(read_config, weights, source).eval()
    torch.testing.assert_close(ours.logits(IDS), THEIRS(IDS).logits, rtol=0, atol=1e-6)


TYPES = [(form, dtype) for form in ("safetensors", "bin") for dtype in (torch.float64, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("form", "dtype"), [*TYPES, ("llm.c", torch.bfloat16)])
def test_other_types_are_read_as_fp32(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = model().to(dtype)
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    if form == "safetensors":
        source = safetensors(tmp_path, state)
    elif form == "bin":
        source = pt(config(tmp_path) / "pytorch_model.bin", state).parent
    else:
        source = llmc(tmp_path / "gpt2_124M_bf16.bin", LINEAR, version=5)
    ours_config, weights = load_weights(source)
    assert weights.notes == (("weights: stored in float64, rounded to fp32",) if dtype == torch.float64 else ())
    ours = build_model(ours_config, weights, source).eval()
    torch.testing.assert_close(ours.logits(IDS), theirs.float()(IDS).logits, rtol=0, atol=1e-6)


def test_an_untied_head_stays_and_one_that_differs_is_never_dropped(tmp_path: Path) -> None:
    theirs = model(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    read_config, weights = load_weights(tmp_path)
    ours = build_model(read_config, weights, tmp_path).eval()
    torch.testing.assert_close(ours.logits(IDS), theirs(IDS).logits, rtol=0, atol=1e-6)
    config(tmp_path, tie_word_embeddings=True)
    # transformers 4 drops this head, transformers 5 keeps it.
    with pytest.raises(InputError, match=r'not the token embedding .* write "tie_word_embeddings": false into config'):
        load_weights(tmp_path)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        nan = {name: STATE[name].clone().fill_(torch.nan) for name in ("lm_head.weight", "transformer.wte.weight")}
        load_weights(safetensors(tmp_path, STATE | nan))
        nan[name][3, 3] = 0.0
        with pytest.raises(InputError, match="not the token embedding"):
            load_weights(safetensors(tmp_path, STATE | nan))


def test_nanogpts_gelu_is_said(tmp_path: Path) -> None:
    """Its code was changed between two states that no file tells apart."""
    saved = {"model": LINEAR, "model_args": NANOGPT["model_args"] | {"bias": True}}
    read_config, weights = load_weights(pt(tmp_path / "ckpt.pt", saved))
    assert read_config.activation == "gelu-exact"
    (note,) = weights.notes
    assert "has gelu-tanh: convert it" in note
    shown: list[str] = []
    convert(str(tmp_path / "ckpt.pt"), tmp_path / "out", None, shown.append)
    assert note in shown


def test_llmcs_file_converts_to_what_transformers_computes(tmp_path: Path) -> None:
    convert(str(llmc(tmp_path / "gpt2_124M.bin", LINEAR)), tmp_path / "out", None, [].append)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(IDS).logits, THEIRS(IDS).logits, rtol=0, atol=0)


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
    "text": (lambda f: written(f / "x.pt", b"hello"), "no model file known here"),
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
    "a list": (lambda f: pt(f / "x.pt", [1]), "holds no model but a list"),
    "a tensor": (lambda f: pt(f / "x.pt", torch.ones(3)), "holds no model but a Tensor"),
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
    """A GPTConfig that is made by a call, with what a call would be given."""

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
