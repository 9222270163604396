"""What the next token is drawn from: against brute force and transformers' logits processors."""

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt2xla.generation.sampling import SamplingConfig, penalise, pick, probabilities


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_probabilities_equal_those_of_transformers(
    penalty: float, temperature: float, top_k: int, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    text = [3, 50, 3, 99]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    for _ in range(5):
        logits = torch.randn(101, generator=generator) * 3
        expected = processors(torch.tensor([text]), logits.clone()[None])[0].softmax(-1)
        ours = probabilities(penalise(logits, text, penalty), SamplingConfig(temperature, top_k, top_p))
        torch.testing.assert_close(ours / ours.sum(), expected, rtol=1e-5, atol=1e-7)


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
    counts = Counter(pick(logits, [0], sampling, generator) for _ in range(4000))
    observed = [counts[token] / 4000 for token in (1, 3, 0, 2)]
    assert observed == pytest.approx(expected, abs=0.03)
    assert all(count == 0 for count, share in zip(observed, expected, strict=True) if share == 0)


def test_at_temperature_0_the_likeliest_after_the_penalty_is_taken() -> None:
    logits = torch.tensor([1.0, 1.2, -0.1])
    assert pick(logits, [2], SamplingConfig(0), torch.Generator()) == 1
    assert pick(logits, [1], SamplingConfig(0, repetition_penalty=1.5), torch.Generator()) == 0
