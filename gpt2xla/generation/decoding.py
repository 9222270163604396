"""The decoding loop: new tokens for one or several texts side by side, with cached keys and values, on any device.

Shape suffixes: B texts, T new tokens of each text with padding, W = T + 2, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2xla.errors import RunFailed
from gpt2xla.generation.sampling import GREEDY, SamplingConfig, pick
from gpt2xla.model.arithmetic import compute_dtype
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kv_cache import KVCache
from gpt2xla.runtime.base import Device
from gpt2xla.runtime.one_device import OneDevice

READING_OF_A_TOKEN = "reading of a token"  # the name of the step that is repeated for each new token
_SMALLEST_BUCKET = 32  # tokens; buckets double from there


@dataclass
class _Row:
    """One text while it is generated."""

    text: list[int]
    unread: list[int]  # the end of `text` that is not in the cache yet
    generator: torch.Generator
    used: set[int]  # ids of `text` that the repetition penalty counts
    start: int = 0  # tokens in the cache
    ended: bool = False


@torch.no_grad()
def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
    *,
    seeds: Sequence[int] | int = 0,
    vocab_size: int | None = None,
    stop_ids: Collection[int] = (),
    ends: Callable[[int, int], bool] = lambda row, token: False,
    allowed: Callable[[int, Sequence[int]], Tensor | None] = lambda row, new_ids: None,
    watch: Callable[[int, Tensor, int], None] = lambda row, logits_V, token: None,
    rows: int = 0,
    width: int = 0,
    device: Device | None = None,
) -> Iterator[list[int | None]]:
    """Yield one new id for each prompt at each step, or None for a text that has ended, until all have ended.

    A text does not depend on what is generated beside it: it has its own positions, random numbers and window. When it
    outgrows the model's seq_length, its last half is read again and generation continues from there. The repetition penalty
    counts the whole text, except stop ids: texts would no longer end once one of them is in the prompt.

    Args:
        prompts: ids, at least one each; the model reads the last seq_length of them.
        seeds: seed of each text's draws; with one seed for all, equal prompts give equal texts.
        vocab_size: ids of at least this number only pad the model's vocabulary and are never drawn.
        stop_ids: each of them ends a text and is not yielded.
        ends: called as `ends(row, id)` with each id that is yielded; true ends that text after the id.
        allowed: called as `allowed(row, new_ids)` before each draw with all ids that were drawn for the text so far; returns
            which ids may be drawn, (V,) of bool on the host, at least one, or None for all. It costs no program.
        watch: called as `watch(row, logits_V, id)` with each id that is drawn, a stop id too, and the model's logits.
        rows: compute at least this many texts, so that smaller calls do not compile another program.
        width: likewise, read prompts as if they had at least this many tokens.
        device: by default, plain torch on the model's device.

    Raises RunFailed if the model computes NaN."""
    model.eval()
    device = device or OneDevice(model.wte.weight.device)
    seeds = [seeds] * len(prompts) if isinstance(seeds, int) else seeds
    seq_length = model.config.seq_length
    texts = [
        _Row(list(prompt), list(prompt)[-seq_length:], torch.Generator().manual_seed(seed), {*prompt} - {*stop_ids})
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    reader = Reader(model, max(rows, len(texts)), width, device)
    for _ in range(max_new_tokens):
        for row in texts:
            if row.start + len(row.unread) > seq_length:
                row.start, row.unread = 0, row.text[-max(1, seq_length // 2) :]
        logits_BV = reader.read([row.start for row in texts], [row.unread for row in texts])
        step: list[int | None] = [None] * len(texts)
        for number, row in enumerate(texts):
            if row.ended:
                continue
            logits_V = logits_BV[number, :vocab_size]
            if (allowed_V := allowed(number, row.text[len(prompts[number]) :])) is not None:
                logits_V = logits_V.masked_fill(~allowed_V, -torch.inf)
            token = pick(logits_V, row.used, sampling, row.generator)
            watch(number, logits_BV[number, :vocab_size], token)
            row.start += len(row.unread)
            row.text.append(token)
            row.unread = [token]
            if token not in stop_ids:
                step[number] = token
                row.used.add(token)
            if token in stop_ids or ends(number, token):
                row.ended, row.unread = True, []
        if any(token is not None for token in step):
            yield step
        if all(row.ended for row in texts):
            return


class Reader:
    """Runs the model with a cache of `rows` texts, on its device.

    If each shape costs a compile, it uses few shapes: one token per text, or one of the buckets for prompts, always over the
    whole cache. If each number of slots costs time, it uses few of these."""

    def __init__(self, model: GPT2, rows: int, width: int, device: Device) -> None:
        self.rows, self.width, self.device, self.seq_length = rows, width, device, model.config.seq_length
        self.static = model.kernels.static_shapes
        self.slots_at_once = self.seq_length if self.static else device.slots_at_once
        with device.autocast():
            dtype = compute_dtype(model.wte.weight)

        def zeros(*shape: int) -> Tensor:
            if self.static:  # made on the device, they would be part of the first program
                return device.to_device(torch.zeros(shape, dtype=dtype))
            return torch.zeros(shape, dtype=dtype, device=device.device)

        cache = KVCache(model.config, rows, zeros)

        # It does not know the reader, so no circle of references keeps the cache in memory.
        def read(texts_BW: Tensor, span: int) -> Tensor:
            with device.autocast():
                starts_B, counts_B, ids_BT = texts_BW[:, 0], texts_BW[:, 1], texts_BW[:, 2:]
                return model.next_logits(ids_BT, starts_B, counts_B, cache, span).float()

        self._read_prompts = device.compile_step(read, "reading of prompts")
        self._read_token = device.compile_step(read, READING_OF_A_TOKEN)

    def read(self, starts: Sequence[int], unread: Sequence[Sequence[int]]) -> Tensor:
        """Read the unread end of each text, and return the logits (rows, V) that follow it, in fp32 on the host. Text b has
        starts[b] tokens in the cache; what the cache holds after them is forgotten. Raises RunFailed if a logit is NaN."""
        new = max(map(len, unread))
        if self.static:
            new = _bucket(new if new <= 1 else max(new, self.width), self.seq_length)
        needed = max(starts) + new
        span = min(-(-needed // self.slots_at_once) * self.slots_at_once, self.seq_length)
        # All that the device needs, in one copy: per text its start, its count and its ids, padded as `GPT2.next_logits`
        # expects it.
        rows = [
            [start, len(ids), *ids, *[ids[-1] if ids else 0] * (new - len(ids))]
            for start, ids in zip(starts, unread, strict=True)
        ]
        rows += [[0] * (2 + new)] * (self.rows - len(rows))
        read = self._read_token if new == 1 else self._read_prompts
        logits_BV = read(self.device.to_device(torch.tensor(rows, dtype=torch.int64)), span).cpu()
        if logits_BV.amax().isnan():  # nothing can be drawn from NaN, nor compared
            raise RunFailed("the model's logits are NaN: its weights are damaged, or --dtype is too small for them")
        return logits_BV


def _bucket(new: int, seq_length: int) -> int:
    """Return the number of tokens to which `new` are padded."""
    if new <= 1:
        return 1
    size = _SMALLEST_BUCKET
    while size < new:
        size *= 2
    return min(size, seq_length)
