"""Sampling against brute force and against Hugging Face's generate."""

from collections import Counter

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2xla.config import ModelConfig
from gpt2xla.hf import from_hf_state, to_hf_config
from gpt2xla.model import GPT2
from gpt2xla.sampling import SamplingConfig, generate, pick

GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def models() -> tuple[GPT2, GPT2LMHeadModel]:
    config = ModelConfig(vocab_size=61, seq_length=48, d_model=32, num_layers=2, num_heads=4)
    torch.manual_seed(3)
    theirs = GPT2LMHeadModel(GPT2Config.from_dict(to_hf_config(config, None))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = GPT2(config)
    ours.load_state_dict(from_hf_state(config, theirs.state_dict()))
    return ours, theirs


def test_greedy_text_equals_hugging_faces(models) -> None:
    ours, theirs = models
    prompt = [3, 1, 4, 1, 5]
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=43, pad_token_id=0)[0, 5:]
    assert list(generate(ours, prompt, 43, GREEDY, torch.Generator())) == expected.tolist()


def test_text_outgrows_the_context(models) -> None:
    """Each token past the context is the likeliest after the window that a plain, uncached model is shown."""
    ours, _ = models
    prompt = list(range(40))
    tokens = list(generate(ours, prompt, 100, GREEDY, torch.Generator()))
    assert len(tokens) == 100
    text, start = prompt + tokens, 0
    with torch.no_grad():
        for position in range(40, 140):
            if position - start > 48:
                start = position - 24
            window = torch.tensor([text[start:position]])
            assert ours.logits(window)[0, -1].argmax() == text[position], position


def test_a_prompt_longer_than_the_context_is_read_from_its_end(models) -> None:
    ours, _ = models
    prompt = [7] * 30 + list(range(48))
    first = next(generate(ours, prompt, 1, GREEDY, torch.Generator()))
    assert first == ours.logits(torch.tensor([prompt[-48:]]))[0, -1].argmax()


def test_generation_stops_before_the_stop_token(models) -> None:
    ours, _ = models
    tokens = list(generate(ours, [3], 30, GREEDY, torch.Generator()))
    stop = tokens[5]
    assert list(generate(ours, [3], 30, GREEDY, torch.Generator(), stop_id=stop)) == tokens[: tokens.index(stop)]


def test_padded_ids_are_never_drawn(models) -> None:
    ours, _ = models
    flat = SamplingConfig(temperature=50.0)
    tokens = list(generate(ours, [3], 300, flat, torch.Generator().manual_seed(0), vocab_size=20))
    assert max(tokens) < 20


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingConfig(), [0.5, 0.25, 0.15, 0.1]),
        (SamplingConfig(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(top_p=0.5), [1, 0, 0, 0]),
        (SamplingConfig(top_p=0.01), [1, 0, 0, 0]),
        (SamplingConfig(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (SamplingConfig(top_k=3, top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(top_k=100), [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_frequencies_follow_the_settings(sampling: SamplingConfig, expected: list[float]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[torch.tensor([2, 0, 3, 1])]  # unsorted: 0.15 0.5 0.1 0.25
    generator = torch.Generator().manual_seed(0)
    counts = Counter(pick(logits, sampling, generator) for _ in range(4000))
    observed = [counts[token] / 4000 for token in (1, 3, 0, 2)]
    assert observed == pytest.approx(expected, abs=0.03)
    assert all(count == 0 for count, share in zip(observed, expected, strict=True) if share == 0)
