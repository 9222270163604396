"""Other trainers' files become Hugging Face folders that compute the same."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run, run_here, succeed
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2xla.checkpoint.convert import convert
from gpt2xla.checkpoint.formats.pt_file import load_pt_model
from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError

ARGUMENTS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 300, "dropout": 0.0}


def nanogpt_file(
    file: Path, *, bias: bool, prefix: str = "_orig_mod.", vocab_size: int = 300, **changes: object
) -> Path:
    """Write a file as nanoGPT's train.py does: compiled, with the head as a second name of the embedding."""
    generator = torch.Generator().manual_seed(5)
    arguments = ARGUMENTS | {"bias": bias, "vocab_size": vocab_size}
    width = arguments["n_embd"]
    shapes = {"wte.weight": (vocab_size, width), "wpe.weight": (24, width), "ln_f.weight": (width,)}
    for layer in range(2):
        shapes |= {
            f"h.{layer}.ln_1.weight": (width,), f"h.{layer}.attn.c_attn.weight": (3 * width, width),
            f"h.{layer}.attn.c_proj.weight": (width, width), f"h.{layer}.ln_2.weight": (width,),
            f"h.{layer}.mlp.c_fc.weight": (4 * width, width), f"h.{layer}.mlp.c_proj.weight": (width, 4 * width),
        }  # fmt: skip
    if bias:
        matrices = [name for name in shapes if not name.startswith("w")]
        shapes |= {name.replace("weight", "bias"): shapes[name][:1] for name in matrices}
    state = {
        f"{prefix}transformer.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()
    }
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
    saved = {
        "model": state, "optimizer": {"state": {}, "param_groups": []}, "model_args": arguments, "iter_num": 20,
        "best_val_loss": torch.tensor(3.5), "config": {"learning_rate": 6e-4, "out_dir": "out", "compile": True},
    } | changes  # fmt: skip
    torch.save(saved, file)
    return file


def plain_forward(file: Path, ids_BT: Tensor) -> Tensor:
    """Return the logits, in float64, of the model in nanoGPT's file, by the formulas of a pre-norm transformer."""
    saved = torch.load(file, weights_only=True)
    w = {name.removeprefix("_orig_mod.").removeprefix("transformer."): t.double() for name, t in saved["model"].items()}
    heads = saved["model_args"]["n_head"]

    def affine(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(()))

    length = ids_BT.shape[1]
    x = w["wte.weight"][ids_BT] + w["wpe.weight"][:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(saved["model_args"]["n_layer"]):
        q, k, v = affine(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(x.shape[-1], dim=-1)
        y = torch.empty_like(x)
        for part in torch.arange(x.shape[-1]).chunk(heads):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(len(part))
            y[..., part] = scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part]
        x = x + affine(y, f"h.{layer}.attn.c_proj")
        z = affine(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        x = x + affine(z, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


IDS = torch.arange(40).view(2, 20) * 7


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_nanogpts_file_is_the_same_function_here_and_in_hugging_face(bias: bool, prefix: str, tmp_path: Path) -> None:
    file = nanogpt_file(tmp_path / "ckpt.pt", bias=bias, prefix=prefix)
    expected = plain_forward(file, IDS)
    config, weights = load_weights(file)
    assert config == ModelConfig(300, 24, 32, 2, 4, activation="gelu-exact", bias=bias)
    ours = build_model(config, weights, file).eval()
    torch.testing.assert_close(ours.logits(IDS).double(), expected, rtol=0, atol=1e-4)

    output = tmp_path / "converted"
    shown: list[str] = []
    convert(str(file), output, "bytes", shown.append)
    assert "tokenizer: bytes, as requested" in shown
    theirs = AutoModelForCausalLM.from_pretrained(output).eval()
    torch.testing.assert_close(theirs(IDS).logits.double(), expected, rtol=0, atol=1e-4)
    loss = theirs(IDS, labels=IDS).loss.item()
    assert loss == pytest.approx(F.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item(), rel=1e-5)
    assert AutoTokenizer.from_pretrained(output)("Hé")["input_ids"] == list("Hé".encode())
    again, back = load_weights(output)
    assert again == config
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_training_and_generating_start_from_nanogpts_file(data_flags: list[str], tmp_path: Path) -> None:
    file = nanogpt_file(tmp_path / "ckpt.pt", bias=False, vocab_size=300)
    flags = ["--train-batch-size", 4, "--eval-batch-size", 4, "--gradient-accum-step", 1, "--valid-steps", 1]
    flags += ["--train-steps", 2, "--warmup-steps", 0, "--decay-steps", 2, "--vocab-size", 384, "--seq-length", 16]
    shown = succeed(
        run("run_pretrain.py", *data_flags, *flags, "--from-checkpoint", file, "--checkpoints-dir", tmp_path / "run")
    )
    assert "300 ids and 84 of padding" in shown
    assert load_weights(tmp_path / "run" / "step-00000002")[0].real_vocab_size == 300
    shown = succeed(
        run_here("generate.py", "--model", file, "--tokenizer", "bytes", "--prompt", "Hé", "--max-new-tokens", 5)
    )
    assert shown.startswith("Hé")


@pytest.mark.parametrize("size", [300, 50257])
def test_no_tokenizer_is_assumed_from_the_size_of_a_vocabulary(size: int, tmp_path: Path) -> None:
    file, output = nanogpt_file(tmp_path / "ckpt.pt", bias=True, vocab_size=size), tmp_path / "out"
    shown = succeed(run_here("scripts/convert_checkpoint.py", "--input", file, "--output-dir", output))
    assert f"tokenizer: none written, because {file} has none; add one with --tokenizer, such as gpt2" in shown
    assert {path.name for path in output.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    card = (output / "README.md").read_text()
    assert "converted by gpt2xla from ckpt.pt." in card
    assert "| tokenizer | none is stored here |" in card
    for model in (file, output):
        result = run_here("generate.py", "--model", model, "--prompt", "x")
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
        assert f"{model} has no tokenizer; name the one that it was trained with: --tokenizer gpt2" in result.stderr


class Anything:
    """An object of a class that real files never hold."""


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    good = nanogpt_file(tmp_path / "good.pt", bias=True)
    state = torch.load(good, weights_only=True)["model"]
    wte = "_orig_mod.transformer.wte.weight"
    cases = {
        "objects": ({"config": Anything()}, "nothing in it was run"),
        "no tensor": ({"model": state | {"x": 3}}, "'x' among the model's weights is not a tensor"),
        "missing": ({"model": {k: v for k, v in state.items() if "ln_f.weight" not in k}}, "no tensor ln_f.weight"),
        "extra": (
            {"model": state | {"_orig_mod.transformer.h.7.ln_1.weight": torch.ones(32)}},
            "holds _orig_mod.transformer.h.7.ln_1.weight",
        ),
        "shape": ({"model": state | {wte: torch.ones(299, 32)}}, "is not the token embedding"),
        "width": ({"model_args": ARGUMENTS | {"n_embd": 64}}, "32 where its configuration says"),
        "type": ({"model": state | {"_orig_mod.transformer.ln_f.bias": torch.ones(32).int()}}, "torch.int32"),
        "options": ({"model_args": ARGUMENTS | {"rotary": True}}, "rotary"),
        "layout": ({"model_args": None, "config": None}, "does not describe its model"),
    }
    for name, (changes, message) in cases.items():
        file = nanogpt_file(tmp_path / f"{name}.pt", bias=True, **changes)
        with pytest.raises(InputError, match=message):
            load_pt_model(file)
    output, small = tmp_path / "out", nanogpt_file(tmp_path / "small.pt", bias=True, vocab_size=200)
    for flags, message in (
        (["--input", tmp_path / "objects.pt", "--output-dir", output], "nothing in it was run"),
        (["--input", good, "--output-dir", tmp_path], "exists already"),
        (["--input", small, "--output-dir", output, "--tokenizer", "bytes"], "--tokenizer bytes has 257 ids"),
    ):
        result = run_here("scripts/convert_checkpoint.py", *flags)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr
    assert not output.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_our_checkpoints_converts_to_its_newest(trained: Path, tmp_path: Path) -> None:
    """The folder has no files that only training needs."""
    succeed(run_here("scripts/convert_checkpoint.py", "--input", trained, "--output-dir", tmp_path / "out"))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    _, weights = load_weights(tmp_path / "out")
    _, original = load_weights(trained / "step-00000020")
    assert all(torch.equal(weights[name], original[name]) for name in original)
