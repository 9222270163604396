"""Texts that go on: prompts as text in, the model's continuations as text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpt2xla.errors import InputError
from gpt2xla.generation import Device, generate
from gpt2xla.model import GPT2
from gpt2xla.sampling import SamplingConfig
from gpt2xla.tokenizer import TextStream, Tokenizer


class Continuation:
    """One text as it grows, up to a stop string. Handed out is only what no later token can take back: whole characters, and
    no beginning of a stop string.

    Attributes:
        prompt: as it is shown: what the tokenizer makes of its ids, without end-of-text.
        text: what has been handed out so far, without the prompt.
        tokens: new ids so far, with those of a stop string.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stop = stop
        self._held = ""
        self.prompt = self._stream.text
        self.prompt_tokens = len(prompt_ids)
        self.text = ""
        self.tokens = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """What the token lets out, which may be nothing."""
        self.tokens += 1
        return self._let_out(self._stream.add(token), at_end=False)

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        return "" if self.stopped else self._let_out(self._stream.rest(), at_end=True)

    def _let_out(self, new: str, *, at_end: bool) -> str:
        pending = self._held + new
        found = [place for place in map(pending.find, self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            out = pending[: min(found)]
        else:
            safe = len(pending) - (0 if at_end else _beginning_of(self._stop, pending))
            out, self._held = pending[:safe], pending[safe:]
        self.text += out
        return out


def _beginning_of(stop: Sequence[str], text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max(map(len, stop), default=0)
    lengths = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids to begin with: an empty prompt begins after an end of text. Raises InputError if there is no such token."""
    ids = tokenizer.encode(prompt) or ([] if tokenizer.eot_id is None else [tokenizer.eot_id])
    if not ids:
        raise InputError("--prompt is empty, and the tokenizer has no end-of-text token to start from; give some text")
    return ids


def continue_texts(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    samples: int = 1,
    stop: Sequence[str] = (),
    rows: int = 0,
    device: Device | None = None,
    show: Callable[[str], None] = lambda text: None,
) -> list[Continuation]:
    """`samples` continuations of each prompt, in the prompts' order, all computed side by side.

    Sample number j, from 0, of a prompt draws with seed + j: it is the same text whatever else is asked for.

    Args:
        show: gets the pieces of the first text as they come.
        rows, device: see `generate`.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts for _ in range(samples)]
    texts = [Continuation(tokenizer, row, stop) for row in ids]
    show(texts[0].prompt)

    def add(row: int, token: int) -> bool:
        new = texts[row].add(token)
        if row == 0:
            show(new)
        return texts[row].stopped

    steps = generate(
        model, ids, max_new_tokens, sampling, seeds=[seed + number for _ in prompts for number in range(samples)],
        vocab_size=tokenizer.vocab_size, stop_id=tokenizer.eot_id, ends=add, rows=rows, device=device,
    )  # fmt: skip
    for _ in steps:
        pass
    rests = [text.rest() for text in texts]
    show(rests[0])
    return texts
