"""Models in the forms that people have them: each computes what transformers computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_forms import (
    BODY,
    BUILD,
    FSDP,
    IDS,
    LINEAR,
    NANOGPT,
    STATE,
    THEIRS,
    config,
    in_parts,
    kept_by_save_model,
    llmc,
    model,
    prefixed,
    pt,
    safetensors,
)  # fmt: skip
from transformers import AutoModelForCausalLM

from gpt2xla.checkpoint.convert import convert
from gpt2xla.checkpoint.loading import build_model, load_weights, locate
from gpt2xla.errors import InputError

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


def test_nanogpts_gelu_is_reported(tmp_path: Path) -> None:
    """Its code changed between two versions, and no file says which one made it."""
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
