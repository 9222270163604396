"""Folders that Hugging Face loads as they are, and Hugging Face's folders read back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2xla import hf
from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError
from gpt2xla.model import GPT2

CONFIGS = {
    "gpt2": ModelConfig(61, 24, 32, 2, 2),
    "untied": ModelConfig(61, 24, 32, 2, 2, tie_weights=False),
    "no biases": ModelConfig(61, 24, 32, 2, 2, bias=False),
    "own d_ff, relu": ModelConfig(61, 24, 32, 2, 2, d_ff=80, activation="relu"),
}


def random_model(config: ModelConfig) -> GPT2:
    model = GPT2(config).eval()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():  # so that no bias is 0 and no norm 1
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_through_hugging_face(config: ModelConfig, tmp_path: Path) -> None:
    ours = random_model(config)
    hf.save_model(tmp_path, config, ours.state_dict(), eot_id=60)
    theirs, problems = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == config.tie_weights
    ids = torch.arange(20)[None]
    torch.testing.assert_close(theirs.eval()(ids).logits, ours.logits(ids), rtol=0, atol=1e-5)

    again = tmp_path / "again"
    theirs.save_pretrained(again)
    read_config, state = hf.load_model(again)
    model = GPT2(read_config).eval()
    model.load_state_dict(state)
    torch.testing.assert_close(model.logits(ids), ours.logits(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_our_own_folder_reads_back_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    ours = random_model(config)
    hf.save_model(tmp_path, config, ours.state_dict(), eot_id=None)
    read_config, state = hf.load_model(tmp_path)
    assert read_config == config
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())


def test_openais_layout_without_prefix_and_with_masks_is_read(tmp_path: Path) -> None:
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2)).eval()
    theirs.config.save_pretrained(tmp_path)
    state = {name: tensor.contiguous() for name, tensor in theirs.transformer.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config, ours_state = hf.load_model(tmp_path)
    ours = GPT2(config).eval()
    ours.load_state_dict(ours_state)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"activation_function": "silu"}, "silu"),
        ({"n_head": 5}, "does not divide"),
        ({"n_embd": None}, "config.json"),
    ],
)
def test_what_is_no_gpt2_of_ours_is_refused_by_name(change: dict, culprit: str, tmp_path: Path) -> None:
    config = CONFIGS["gpt2"]
    hf.save_model(tmp_path, config, random_model(config).state_dict(), eot_id=None)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=culprit):
        hf.load_model(tmp_path)


def test_a_cut_weights_file_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["gpt2"]
    hf.save_model(tmp_path, config, random_model(config).state_dict(), eot_id=None)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        hf.load_model(tmp_path)


def test_an_unknown_name_offline_says_how_to_go_on() -> None:
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set; unset it, or give the path of a folder"):
        hf.find_folder("gpt2-medium")
    with pytest.raises(InputError, match="no such folder"):
        hf.find_folder("./no/such/folder/at/all")
