"""The model against Hugging Face's GPT-2 and against itself in float64."""

import math

import pytest
import torch
from hf_state import from_hf_state
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hf_config import to_hf_config
from gpt2xla.config import ModelConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.loss import IGNORED_LABEL

SMALL = ModelConfig(vocab_size=61, seq_length=24, d_model=32, num_layers=3, num_heads=4)


def pair(config: ModelConfig) -> tuple[GPT2, GPT2LMHeadModel]:
    """Hugging Face's GPT-2 with random weights, all biases and norms included, and ours with the same."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config.from_dict(to_hf_config(config))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = GPT2(config).eval()
    ours.load_state_dict(from_hf_state(config, theirs.state_dict()))
    return ours, theirs


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        ModelConfig(61, 24, 32, 2, 2, d_ff=80, activation="gelu-exact"),
        ModelConfig(61, 24, 32, 2, 2, activation="relu", tie_weights=False, layer_norm_eps=1e-3),
    ],
    ids=["gpt2", "exact gelu, odd d_ff", "relu, untied"],
)
def test_logits_and_loss_equal_hugging_faces(config: ModelConfig) -> None:
    ours, theirs = pair(config)
    ids = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    loss, count = ours(ids[:, :-1], ids[:, 1:])
    assert count == 3 * 23
    torch.testing.assert_close(loss / count, theirs(ids, labels=ids).loss, rtol=1e-6, atol=0)


def test_gradients_equal_hugging_faces() -> None:
    ours, theirs = pair(SMALL)
    ids = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(1))
    loss, count = ours(ids[:, :-1], ids[:, 1:])
    (loss / count).backward()
    theirs(ids, labels=ids).loss.backward()
    expected = from_hf_state(SMALL, {name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_ignored_labels_have_no_loss_and_are_not_counted() -> None:
    ours, _ = pair(SMALL)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    whole, _ = ours(ids[:1, :-1], labels[:1])
    labels[1] = IGNORED_LABEL
    loss, count = ours(ids[:, :-1], labels)
    assert count == 8
    torch.testing.assert_close(loss, whole)


def test_the_future_is_not_seen() -> None:
    ours, _ = pair(SMALL)
    ids = torch.zeros(1, 24, dtype=torch.long)
    other = ids.clone()
    other[0, 12:] = 5
    torch.testing.assert_close(ours.logits(ids)[:, :12], ours.logits(other)[:, :12])


def test_initialisation_is_gpt2s() -> None:
    config = ModelConfig(vocab_size=500, seq_length=64, d_model=256, num_layers=8, num_heads=4)
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(0))
    state = model.state_dict()
    for name, expected in (
        ("wte.weight", 0.02),
        ("wpe.weight", 0.02),
        ("h.3.attn.c_attn.weight", 0.02),
        ("h.3.mlp.c_fc.weight", 0.02),
        ("h.3.attn.c_proj.weight", 0.02 / math.sqrt(16)),
        ("h.3.mlp.c_proj.weight", 0.02 / math.sqrt(16)),
    ):
        assert state[name].std().item() == pytest.approx(expected, rel=0.05), name
    assert all(not value.any() for name, value in state.items() if name.endswith("bias"))
    assert all((value == 1).all() for name, value in state.items() if "ln_" in name and name.endswith("weight"))


def test_openais_sizes_have_their_published_parameter_counts() -> None:
    from gpt2xla.config import PRESETS

    counts = {}
    with torch.device("meta"):
        for name, options in PRESETS.items():
            counts[name] = GPT2(ModelConfig(**options)).num_parameters()
    assert counts == {
        "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200
    }  # fmt: skip


def test_dropout_acts_in_training_only() -> None:
    model = GPT2(ModelConfig(61, 24, 32, 2, 2, dropout=0.5))
    model.init_weights()
    ids = torch.zeros(1, 8, dtype=torch.long)
    model.train()
    assert not torch.equal(model.logits(ids), model.logits(ids))
    model.eval()
    assert torch.equal(model.logits(ids), model.logits(ids))


def test_flops_per_token_equal_a_count_of_the_matrix_products() -> None:
    """Against torch's own counter, with attention as plain products: it does not count the fused kernel of the CPU."""
    model = GPT2(SMALL)
    model.init_weights()
    ids = torch.zeros(2, SMALL.seq_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids)[0].backward()
    # PaLM's 6 N takes biases and norms for matrices too.
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert model.flops_per_token() - 6 * vectors == counter.get_total_flops() / ids.numel()
