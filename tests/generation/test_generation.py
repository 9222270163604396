"""Generation against Hugging Face's generate and against an uncached model."""

import dataclasses
import itertools
import json

import pytest
import torch
from conftest import run_xla, succeed
from hf_state import from_hf_state
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hf_config import to_hf_config
from gpt2xla.config import PRESETS, ModelConfig
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.packed_linear import pack_linears
from gpt2xla.generation.sampling import GREEDY, SamplingConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.model.kv_cache import KVCache

Pair = tuple[GPT2, GPT2LMHeadModel]
SMALL = ModelConfig(vocab_size=61, seq_length=48, d_model=32, num_layers=2, num_heads=4)


def pair(config: ModelConfig, noise: float = 0.3) -> Pair:
    """Hugging Face's GPT-2 with random weights, biases and norms included, and ours with the same."""
    torch.manual_seed(3)
    theirs = GPT2LMHeadModel(GPT2Config.from_dict(to_hf_config(config))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    ours = GPT2(config).eval()
    ours.load_state_dict(from_hf_state(config, theirs.state_dict()))
    return ours, theirs


@pytest.fixture(scope="module")
def models() -> Pair:
    return pair(SMALL)


@pytest.fixture(scope="module", params=["as it is", "packed", "static shapes"])
def ways(request: pytest.FixtureRequest) -> Pair:
    """The model as each device computes it."""
    ours, theirs = pair(SMALL)
    if request.param == "packed":
        assert pack_linears(ours) is None
    if request.param == "static shapes":
        ours.kernels = Kernels(static_shapes=True)
    return ours, theirs


def tokens_of(model: GPT2, prompt: list[int], count: int, sampling: SamplingConfig = GREEDY, **options) -> list[int]:
    return [token for (token,) in generate(model, [prompt], count, sampling, **options)]


def greedy_of(theirs: GPT2LMHeadModel, prompt: list[int], count: int, **options) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = theirs.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=None, **options
    )
    return out[0, len(prompt) :].tolist()


def cached_logits(model: GPT2, ids: torch.Tensor, read_at_once: int) -> torch.Tensor:
    """(B, T - read_at_once + 1, V): after the first tokens, and after each one more."""
    rows, length = ids.shape
    cache = KVCache(model.config, rows, torch.zeros)
    steps = [(0, read_at_once), *((t, t + 1) for t in range(read_at_once, length))]
    with torch.no_grad():
        parts = [
            model.next_logits(ids[:, a:b], torch.full((rows,), a), torch.full((rows,), b - a), cache, b)
            for a, b in steps
        ]
    return torch.stack(parts, dim=1)


def test_greedy_text_equals_hugging_faces(ways: Pair) -> None:
    ours, theirs = ways
    for prompt in ([3, 1, 4, 1, 5], [7], list(range(40))):
        new = 48 - len(prompt)
        assert tokens_of(ours, prompt, new) == greedy_of(theirs, prompt, new)


def test_cached_logits_equal_hugging_faces_and_uncached_ones(ways: Pair) -> None:
    ours, theirs = ways
    ids = torch.randint(0, 61, (3, 48), generator=torch.Generator().manual_seed(1))
    cached = cached_logits(ours, ids, read_at_once=7)
    with torch.no_grad():
        torch.testing.assert_close(cached, theirs(ids).logits[:, 6:], rtol=0, atol=1e-4)
        torch.testing.assert_close(cached, ours.logits(ids)[:, 6:], rtol=0, atol=1e-4)


def test_texts_side_by_side_equal_each_alone(ways: Pair) -> None:
    """Of all lengths, one longer than the context; they outgrow it at different times, and some end early."""
    ours, _ = ways
    prompts = [[3], list(range(17)), list(range(47)), [7] * 30 + list(range(40)), [60, 59]]
    sampling = SamplingConfig(temperature=0.9, top_k=30, repetition_penalty=1.1)
    seeds = [5, 6, 7, 8, 9]
    stop = tokens_of(ours, prompts[1], 20, sampling, seeds=6)[12]
    alone = [tokens_of(ours, p, 90, sampling, seeds=s, stop_ids=[stop]) for p, s in zip(prompts, seeds, strict=True)]
    steps = list(generate(ours, prompts, 90, sampling, seeds=seeds, stop_ids=[stop], rows=7))
    together = [[step[row] for step in steps if step[row] is not None] for row in range(5)]
    assert together == alone
    assert len({len(text) for text in alone}) > 1


def test_the_repetition_penalty_is_that_of_hugging_face(models: Pair) -> None:
    ours, theirs = models
    sampling = SamplingConfig(temperature=0, repetition_penalty=1.3)
    expected = greedy_of(theirs, [3, 1, 4], 45, repetition_penalty=1.3)
    assert tokens_of(ours, [3, 1, 4], 45, sampling) == expected
    assert expected != greedy_of(theirs, [3, 1, 4], 45)


def test_text_outgrows_the_context(ways: Pair) -> None:
    """Each token past the context is the likeliest after the window that a plain, uncached model is shown."""
    ours, theirs = ways
    prompt = list(range(40))
    tokens = tokens_of(ours, prompt, 100)
    assert len(tokens) == 100
    text, start = prompt + tokens, 0
    with torch.no_grad():
        for position in range(40, 140):
            if position - start > 48:
                start = position - 24
            window = torch.tensor([text[start:position]])
            assert theirs(window).logits[0, -1].argmax() == text[position], position


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 8])
def test_every_batch_gives_the_texts_of_a_plain_loop(context: int, static_shapes: bool) -> None:
    """Every pair of prompt lengths up to beyond the context, all of them at once, and each alone, until the windows have
    moved several times. In float64, so that no rounding decides."""
    ours, theirs = pair(dataclasses.replace(SMALL, seq_length=context, vocab_size=13), noise=0.5)
    ours.double()
    theirs.double()
    ours.kernels = Kernels(static_shapes=static_shapes)
    prompts = [[(3 * n + i) % 13 for i in range(n)] for n in range(1, context + 3)]
    new = 3 * context + 2
    expected = [plain_loop(theirs, prompt, new) for prompt in prompts]
    lengths = range(len(prompts))
    batches = [*itertools.combinations_with_replacement(lengths, 2 if context < 8 else 1), tuple(lengths)]
    for batch in batches:
        steps = list(generate(ours, [prompts[n] for n in batch], new))
        assert [list(text) for text in zip(*steps, strict=True)] == [expected[n] for n in batch], batch


def plain_loop(theirs: GPT2LMHeadModel, prompt: list[int], count: int) -> list[int]:
    """Greedy, without a cache: the window grows to the context, then starts again with its last half."""
    context = theirs.config.n_positions
    text, window = list(prompt), prompt[-context:]
    for _ in range(count):
        if len(window) > context:
            window = text[-max(1, context // 2) :]
        with torch.no_grad():
            token = int(theirs(torch.tensor([window])).logits[0, -1].argmax())
        text.append(token)
        window = [*window, token]
    return text[len(prompt) :]


def test_a_prompt_longer_than_the_context_is_read_from_its_end(models: Pair) -> None:
    ours, theirs = models
    prompt = [7] * 30 + list(range(48))
    with torch.no_grad():
        assert tokens_of(ours, prompt, 1) == [theirs(torch.tensor([prompt[-48:]])).logits[0, -1].argmax()]


def test_generation_stops_before_the_stop_token_and_after_what_ends_it(models: Pair) -> None:
    ours, _ = models
    tokens = tokens_of(ours, [3], 30)
    stop = tokens[5]
    assert tokens_of(ours, [3], 30, stop_ids=[stop]) == tokens[: tokens.index(stop)]
    ends = tokens_of(ours, [3], 30, ends=lambda row, token: token == stop)
    assert ends == tokens[: tokens.index(stop) + 1]


def test_padded_ids_are_never_drawn(models: Pair) -> None:
    ours, _ = models
    tokens = tokens_of(ours, [3], 300, SamplingConfig(temperature=50.0), vocab_size=20)
    assert max(tokens) < 20


def test_each_token_is_read_once(models: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = models
    read: list[int] = []
    hidden = GPT2.hidden
    monkeypatch.setattr(GPT2, "hidden", lambda self, ids, cache: read.append(ids.shape[1]) or hidden(self, ids, cache))
    tokens_of(ours, [1] * 20, 28)
    assert read == [20] + [1] * 27


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PRESETS))
def test_openais_sizes_give_hugging_faces_logits_and_greedy_text(name: str) -> None:
    """Random weights of the published widths; the two largest with fewer layers, which are all alike."""
    sizes = PRESETS[name] | {"num_layers": min(PRESETS[name]["num_layers"], 24 if name != "gpt2-xl" else 8)}
    config = ModelConfig(**sizes)
    ours, theirs = pair(config, noise=0.0)
    assert pack_linears(ours) is None
    ids = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits[:, 29:]
    torch.testing.assert_close(cached_logits(ours, ids, read_at_once=30), expected, rtol=0, atol=1e-4)
    prompt = ids[0, :20].tolist()
    assert tokens_of(ours, prompt, 200) == greedy_of(theirs, prompt, 200)


def test_on_xla_the_number_of_programs_does_not_depend_on_the_lengths() -> None:
    """The worker generates greedily: 20 tokens, 200 tokens, after another prompt of the same bucket, and after prompts of
    two buckets that are read at one width. What may be drawn in a picture is another program nowhere. Then it looks inside
    texts of five lengths, in two buckets."""
    result = json.loads(succeed(run_xla(program="tests/workers/generation_worker.py")).splitlines()[-1])
    first = {"20 tokens": 2, "200 tokens": 2, "another prompt": 2, "past the context": 3}
    assert result["compiles"] == first | {"a conversation": 4, "which grows": 4, "a drawing": 4}
    assert result["xla"] == result["torch"]
    assert result["drawn"]["xla"] == result["drawn"]["torch"]
    assert result["inside"]["programs"] == {"3": 1, "128": 1, "129": 2, "256": 2, "90": 2}
    assert result["inside"]["difference"] < 1e-4
