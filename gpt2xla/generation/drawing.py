"""Drawing with a model that was trained on sketches, picture by picture or row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.sampling import SamplingConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device
from gpt2xla.sketches.format import Picture, SketchFormat
from gpt2xla.sketches.grammar import PictureGrammar


def draw(
    model: GPT2,
    format: SketchFormat,
    words: Sequence[str],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    *,
    device: Device | None = None,
    rows: int = 0,
) -> list[Picture]:
    """Return a picture of each word, drawn with the seed at its place, as `draw_rows` does."""
    *_, pictures = draw_rows(model, format, words, sampling, seeds, device=device, rows=rows)
    return pictures


def draw_rows(
    model: GPT2,
    format: SketchFormat,
    words: Sequence[str],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    *,
    device: Device | None = None,
    rows: int = 0,
) -> Iterator[list[Picture]]:
    """Yield the pictures so far, (rows, size) of bool each, whenever one of them has another row. All are drawn side by
    side, and each has in the end exactly as many rows as it should.

    Args:
        words: what to draw; a word that the model did not learn is drawn too.
        seeds: seed of each picture's draws: a picture depends on its word and seed, not on those beside it.
        device, rows: see `generate`.

    Raises InputError if a word cannot be written or the model is too small, and as `generate` does."""
    for word in words:
        check_can_draw(model.config, format, word)
    grammar = _grammar(format)
    prompts = [format.drawing_prompt(word).tolist() for word in words]
    # All but the first token of a prompt are dictated one by one. That takes as long as a row of pixels; to read them at
    # once would be another program on XLA.
    dictated = [prompt[1:] for prompt in prompts]
    following: list[list[int]] = [[] for _ in words]

    def picture_of(row: int) -> list[int]:
        return following[row][len(dictated[row]) :]

    def allowed(row: int, new_ids: Sequence[int]) -> Tensor:
        if len(new_ids) < len(dictated[row]):
            return torch.arange(format.tokenizer.vocab_size) == dictated[row][len(new_ids)]
        return grammar.allowed(picture_of(row))

    def ends(row: int, token: int) -> bool:
        following[row].append(token)
        return grammar.is_complete(picture_of(row))

    steps = generate(
        model, [prompt[:1] for prompt in prompts], max(map(len, dictated)) + format.picture_tokens, sampling, seeds=seeds,
        vocab_size=format.tokenizer.vocab_size, ends=ends, allowed=allowed, device=device, rows=rows,
    )  # fmt: skip
    pictures = [format.rows([]) for _ in words]
    for _ in steps:
        now = [format.rows(picture_of(row)) for row in range(len(words))]
        if any(len(new) > len(old) for new, old in zip(now, pictures, strict=True)):
            pictures = now
            yield pictures


def check_can_draw(model: ModelConfig, format: SketchFormat, word: str) -> None:
    """Raise InputError if no sketch can be of a word, or a model lacks some of the format's ids, or its context is too short
    for a picture of the word."""
    ids, known = format.tokenizer.vocab_size, model.real_vocab_size
    if ids > known:
        raise InputError(
            f"the tokenizer's sketches need {ids} ids, and the model has only {known}; train it on sketches"
        )
    needed = len(format.drawing_prompt(word)) + format.picture_tokens - 1  # nothing follows the last token
    if format.has_pieces and needed > model.seq_length:
        raise InputError(
            f"to draw {word!r} takes {needed} tokens, and the model reads only {model.seq_length}; choose a shorter "
            "word, or a model with a longer context"
        )


@lru_cache(maxsize=1)  # a large vocabulary takes half a second
def _grammar(format: SketchFormat) -> PictureGrammar:
    return PictureGrammar(format)
