"""What a model computes along a text, against transformers, document by document, and a model whose heads are known."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_state import from_hf_state
from induction import induction_model
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hf_config import to_hf_config
from gpt2xla.config import ModelConfig
from gpt2xla.errors import RunFailed
from gpt2xla.evals.inside import ATTENTION_TOKENS, look_inside
from gpt2xla.generation.packed_linear import pack_linears
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.runtime.one_device import OneDevice

CONFIG = ModelConfig(vocab_size=64, seq_length=160, d_model=32, num_layers=2, num_heads=4, vocab_padding=3)
END = 7
CPU = OneDevice(torch.device("cpu"))


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    config = GPT2Config.from_dict(to_hf_config(CONFIG) | {"attn_implementation": "eager"})
    torch.manual_seed(3)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def ours(theirs: GPT2LMHeadModel, way: str = "as it is") -> GPT2:
    """Our model with the same weights, as a device computes it."""
    weights = from_hf_state(CONFIG, theirs.state_dict())
    weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, CONFIG.vocab_padding))
    model = GPT2(CONFIG)
    model.load_state_dict(weights)
    if way == "packed":
        assert pack_linears(model) is None
    elif way == "static shapes":
        model.kernels = Kernels(static_shapes=True)
    elif way == "projected apart":
        model.kernels = Kernels(separate_qkv=True)
    return model


def text(count: int) -> list[int]:
    return random.Random(count).choices(range(END + 1, 61), k=count)


@pytest.mark.parametrize("way", ["as it is", "packed", "static shapes", "projected apart"])
@pytest.mark.parametrize("count", [1, 21, 140, 160])  # 140 fills no chunk, and is more than has its attention kept
def test_it_is_what_transformers_computes(theirs: GPT2LMHeadModel, way: str, count: int) -> None:
    model, ids = ours(theirs, way), text(count)
    kernels = model.kernels
    seen = look_inside(model, ids, CPU)
    assert model.kernels is kernels
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), output_attentions=True)
    log_probs = expected.logits[0].double().log_softmax(-1)
    came = log_probs[:-1].gather(1, torch.tensor(ids)[1:, None])
    assert np.isnan(seen.log_probs[0])
    np.testing.assert_allclose(seen.log_probs[1:], came[:, 0], atol=1e-4)
    assert seen.ranks.tolist() == [0, *(log_probs[:-1] > came).sum(1).tolist()]
    best = log_probs.topk(10)
    np.testing.assert_allclose(seen.candidate_log_probs, best.values, atol=1e-4)
    assert (seen.candidates == best.indices.numpy()).all()
    kept = min(count, ATTENTION_TOKENS)
    attentions = torch.cat(expected.attentions)[:, :, :kept, :kept]
    np.testing.assert_allclose(seen.attention, attentions, atol=1e-5)
    assert (np.triu(seen.attention, 1) == 0).all()


@pytest.mark.parametrize("way", ["as it is", "packed", "static shapes"])
def test_documents_are_read_apart_by_a_model_that_was_trained_so(theirs: GPT2LMHeadModel, way: str) -> None:
    model, documents = ours(theirs, way), [text(5), [END], [END, *text(30)], [END, *text(9)]]
    whole = [*itertools.chain(*documents)]
    alone = [look_inside(model, ids, CPU) for ids in documents]
    across = look_inside(model, whole, CPU)
    model.end_of_text = END
    together = look_inside(model, whole, CPU)
    first = 0
    for one in alone:
        place = slice(first, first + len(one.ids))
        assert together.ids[place] == one.ids
        for name in ("candidates", "candidate_log_probs"):
            np.testing.assert_allclose(getattr(together, name)[place], getattr(one, name), atol=1e-4)
        np.testing.assert_allclose(together.log_probs[place][1:], one.log_probs[1:], atol=1e-4)
        np.testing.assert_allclose(together.attention[:, :, place, place], one.attention, atol=1e-5)
        assert (together.attention[:, :, place, :first] == 0).all()
        first = place.stop
    assert abs(across.log_probs - together.log_probs)[6:].max() > 0.1


def test_repetition_shows_as_a_climb_to_certainty() -> None:
    """A model that copies: what comes a second time is certain once its first token was read. Its heads look where they
    are made to."""
    model, period = induction_model(32, 64), random.Random(1).sample(range(32), 12)
    seen = look_inside(model, period * 4, CPU)
    probabilities = np.exp(seen.log_probs)
    assert probabilities[1:13].max() < 0.1
    assert probabilities[13:].min() > 0.999
    assert (seen.ranks[13:] == 0).all()
    assert (seen.candidates[12:, 0] == (period * 4 + period[:1])[13:]).all()
    previous, repeated = seen.attention[:, 0]
    np.testing.assert_allclose(previous[1:, :-1].diagonal(), 1.0, atol=1e-5)
    for token in range(12, 48):
        followers = np.arange(token % 12 + 1, token + 1, 12)  # the places after the same token
        np.testing.assert_allclose(repeated[token, followers].sum(), 1.0, atol=1e-5)


def test_a_small_vocabulary_has_fewer_candidates() -> None:
    seen = look_inside(GPT2(ModelConfig(6, 8, 8, 1, 2)), [3, 4], CPU)
    assert seen.candidates.shape == seen.candidate_log_probs.shape == (2, 6)
    np.testing.assert_allclose(np.exp(seen.candidate_log_probs).sum(1), 1.0, rtol=1e-5)


def test_damaged_weights_are_told() -> None:
    model = induction_model(8, 8)
    model.wte.weight.data[3] = float("nan")
    with pytest.raises(RunFailed, match="NaN"):
        look_inside(model, [2, 3], CPU)
