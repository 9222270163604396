"""config.json is read as transformers' GPT2Config reads it."""

import json
from pathlib import Path

import pytest
import torch
from hf_state import from_hf_state
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2CLS, ACT2FN

from gpt2xla.checkpoint.formats.hf_config import from_hf_config, read_config
from gpt2xla.errors import InputError
from gpt2xla.model.gpt2 import GPT2, MLP

GPT_2 = {"model_type": "gpt2"}
OTHER_NAMES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 40}
READ_AS_THEIRS = [
    {}, OTHER_NAMES, {"n_embd": 24, **OTHER_NAMES}, {**OTHER_NAMES, "n_embd": 24}, {"n_head": 4}, {"n_layer": 1},
    {"num_attention_heads": 4, "n_head": 2}, {"hidden_size": 24, "n_head": 2}, {"n_positions": 7}, {"n_ctx": 5},
    {"vocab_size": 9}, {"n_inner": None}, {"n_inner": 100}, {"intermediate_size": None}, {"intermediate_size": 7},
    {"resid_pdrop": 0}, {"resid_pdrop": 0.3, "attn_pdrop": 0.0}, {"layer_norm_epsilon": 1e-6},
    {"tie_word_embeddings": False}, {"activation_function": "gelu"}, {"reorder_and_upcast_attn": True},
    {"summary_type": "mean", "summary_use_proj": False},
    {"architectures": ["GPT2LMHeadModel"], "model_type": None}, {"architectures": ["TFGPT2LMHeadModel"]},
    {"architectures": None}, {"add_cross_attention": False}, {"torch_dtype": "float16"},
    {"pad_token_id": 3, "eos_token_id": [1, 2]},
]  # fmt: skip


@pytest.mark.parametrize("values", READ_AS_THEIRS, ids=str)
def test_configurations_are_read_as_transformers_reads_them(values: dict) -> None:
    ours, theirs = from_hf_config(GPT_2 | values), GPT2Config.from_dict(GPT_2 | values)
    assert (ours.vocab_size, ours.seq_length, ours.d_model) == (theirs.vocab_size, theirs.n_positions, theirs.n_embd)
    assert (ours.num_layers, ours.num_heads) == (theirs.n_layer, theirs.n_head)
    assert ours.d_ff == (4 * theirs.n_embd if theirs.n_inner is None else theirs.n_inner)
    assert (ours.dropout, ours.layer_norm_eps) == (theirs.resid_pdrop, theirs.layer_norm_epsilon)
    assert ours.tie_weights == theirs.tie_word_embeddings


def test_a_dropout_that_differs_is_reported(tmp_path: Path) -> None:
    """Transformers has three dropout rates, and we have one."""
    for values, notes in (
        ({"attn_pdrop": 0.0}, ("dropout: 0.1 everywhere (resid_pdrop), where config.json has attn_pdrop 0.0",)),
        ({"attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2}, ()),
        ({}, ()),
    ):
        (tmp_path / "config.json").write_text(json.dumps(GPT_2 | values))
        assert read_config(tmp_path)[1] == notes


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        *[
            ({key: None}, "is ")
            for key in ("vocab_size", "n_head", "n_embd", "activation_function", "tie_word_embeddings")
        ],
        *[({key: "4"}, "is ") for key in ("n_layer", "num_attention_heads", "n_inner", "layer_norm_epsilon")],
        ({"hidden_size": None}, "is "),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": "gpt_neo"}, "gpt_neo"),
        ({"model_type": "gpt2", "architectures": "GPT2"}, "architectures"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification, not GPT2LMHeadModel"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"is_causal": False}, "is_causal = False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
    ids=str,
)
def test_other_models_are_refused_by_name(values: dict, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        from_hf_config(GPT_2 | values)


READ = {
    "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh", "relu",
}  # fmt: skip


@pytest.mark.parametrize("name", [*ACT2CLS, "gelu_of_mine"])
def test_an_activation_computes_what_transformers_computes_or_is_refused(name: str) -> None:
    values = GPT_2 | {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 24, "vocab_size": 61}
    if name not in READ:
        with pytest.raises(ValueError, match=f"activation_function '{name}' is not one of"):
            from_hf_config(values | {"activation_function": name})
        return
    config = from_hf_config(values | {"activation_function": name})
    x = torch.linspace(-9, 9, 2000).view(-1, 1, 16)
    mlp = MLP(config)
    mlp.c_fc, mlp.c_proj = torch.nn.Identity(), torch.nn.Identity()
    torch.testing.assert_close(mlp.eval()(x), ACT2FN[name](x), rtol=0, atol=1e-6)
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config.from_dict(values | {"activation_function": name})).eval()
    ours = GPT2(config).eval()
    ours.load_state_dict(from_hf_state(config, theirs.state_dict()))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=0, atol=1e-6)


def test_windows_spellings_of_a_file_are_read_or_named(tmp_path: Path) -> None:
    """A byte order mark is skipped. UTF-16, which PowerShell's > writes, is refused."""
    text, file = json.dumps(GPT_2 | {"n_layer": 3}), tmp_path / "config.json"
    file.write_text(text, encoding="utf-8-sig")
    assert read_config(tmp_path)[0].num_layers == 3
    file.write_text(text, encoding="utf-16")
    with pytest.raises(InputError, match=r"config\.json: it is not text in UTF-8; save it as such"):
        read_config(tmp_path)
