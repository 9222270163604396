"""Texts that go on: prompts as text in, the model's continuations as text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.sampling import SamplingConfig
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device


class TextStream:
    """Text of a growing list of ids, handed out only as far as no later id can change it: a character whose bytes come in
    several tokens appears when it is whole."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(ids)
        self.text = tokenizer.decode(self._ids)

    def add(self, token: int) -> str:
        """What the token adds, without the beginning of a character at its end."""
        self._ids.append(token)
        return self._let_out(self._tokenizer.decode(self._ids).rstrip("\ufffd"))

    def rest(self) -> str:
        """What was held back."""
        return self._let_out(self._tokenizer.decode(self._ids))

    def _let_out(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new


class Continuation:
    """One text as it grows, up to a stop string. Handed out is only what no later token can take back: whole characters, and
    no beginning of a stop string.

    A stop string counts where it lies in the new text as a whole, and the first to be complete ends the text before it,
    however the text is cut into tokens.

    Attributes:
        prompt: as it is shown: what the tokenizer makes of its ids.
        text: what has been handed out so far, without the prompt.
        tokens: new ids so far, with those of a stop string.
        stopped: whether a stop string was found.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = (), hidden_ids: int = 0
    ) -> None:
        self._stream = TextStream(tokenizer, prompt_ids[hidden_ids:])
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
        # Of those complete at the same place, the longest.
        found = [(place + len(s), place) for s in self._stop if (place := pending.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            out = pending[: min(found)[1]]
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


def prompt_ids(tokenizer: Tokenizer, prompt: str, settings: GenerationSettings, vocab_size: int) -> list[int]:
    """The ids to begin with, of a model with `vocab_size` real ones: an empty prompt begins after the token that begins or
    ends a text. Raises InputError if there is no such token, or the prompt has a token that the model lacks."""
    ids = tokenizer.encode(prompt)
    if not ids and (start := settings.start_id(tokenizer, vocab_size)) is not None:
        return [start]
    if not ids:
        raise InputError("--prompt is empty, and the tokenizer has no end-of-text token to start from; give some text")
    if (largest := max(ids)) >= vocab_size:
        raise InputError(
            f"--prompt: {tokenizer.decode([largest])!r} has the id {largest}, and the model only {vocab_size} ids; remove it"
        )
    return ids


def continue_texts(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingConfig,
    *,
    settings: GenerationSettings | None = None,
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
        settings: which ids begin and end a text; default: the tokenizer's.
        show: gets the pieces of the first text as they come.
        rows, device: see `generate`.
    """
    settings, known = settings or GenerationSettings.of(tokenizer), model.config.real_vocab_size
    stop_ids = settings.stop_ids(tokenizer.eot_id)
    ids = [prompt_ids(tokenizer, prompt, settings, known) for prompt in prompts]
    ids = [row for row in ids for _ in range(samples)]
    hidden = [0 if tokenizer.encode(prompt) else 1 for prompt in prompts for _ in range(samples)]
    texts = [Continuation(tokenizer, row, stop, begins) for row, begins in zip(ids, hidden, strict=True)]
    show(texts[0].prompt)

    def add(row: int, token: int) -> bool:
        new = texts[row].add(token)
        if row == 0:
            show(new)
        return texts[row].stopped

    steps = generate(
        model, ids, max_new_tokens, sampling, seeds=[seed + number for _ in prompts for number in range(samples)],
        vocab_size=min(known, max([tokenizer.vocab_size, *(i + 1 for i in stop_ids if i < known)])), stop_ids=stop_ids,
        ends=add, rows=rows, device=device,
    )  # fmt: skip
    for _ in steps:
        pass
    rests = [text.rest() for text in texts]
    show(rests[0])
    return texts
