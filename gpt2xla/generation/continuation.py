"""From prompts as text to the model's continuations as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.sampling import SamplingConfig
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device


@dataclass(frozen=True)
class Prompt:
    """What a text begins with.

    Attributes:
        ids: all that the model reads.
        max_new_tokens: the most tokens that may follow it.
        hidden_ids: how many of its first ids are not shown, such as one that only begins a text."""

    ids: Sequence[int]
    max_new_tokens: int
    hidden_ids: int = 0


class Continuation:
    """One text as it grows, up to a stop string. It returns only what no later token can take back: whole characters, even
    if their bytes come in several tokens, and no beginning of a stop string.

    Stop strings are searched in the new text as a whole, however it is cut into tokens. The first one that is complete ends
    the text before it.

    Attributes:
        prompt: the prompt as it is shown: the text of its ids, without the first `hidden_ids` of them.
        text: what has been returned so far, without the prompt.
        tokens: new ids so far, including those of a stop string.
        stopped: whether a stop string was found."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        hidden_ids: int = 0,
        max_new_tokens: int | None = None,
    ) -> None:
        self._tokenizer, self._stop, self._max_new_tokens = tokenizer, stop, max_new_tokens
        self._ids = list(prompt_ids[hidden_ids:])
        self.prompt = self._decoded = tokenizer.decode(self._ids)
        self._held = self.text = ""
        self.tokens = 0
        self.stopped = False

    @property
    def is_cut(self) -> bool:
        """Whether it has all the tokens that it may have, and neither a stop id nor a stop string ended it before."""
        return self.tokens == self._max_new_tokens and not self.stopped

    def add(self, token: int) -> str:
        """Return the text that is certain after this token, which may be empty."""
        self.tokens += 1
        self._ids.append(token)
        # What follows the last whole character decodes as U+FFFD.
        return self._release(self._tokenizer.decode(self._ids).rstrip("\ufffd"), at_end=False)

    def rest(self) -> str:
        """Return what was held back, after the last token."""
        return "" if self.stopped else self._release(self._tokenizer.decode(self._ids), at_end=True)

    def _release(self, decoded: str, *, at_end: bool) -> str:
        new = decoded[len(self._decoded) :]
        self._decoded += new
        pending = self._held + new
        # If several are complete at the same place, the longest counts: it begins first.
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
    """Return how many characters at the end of `text` may be the beginning of a stop string."""
    longest = max(map(len, stop), default=0)
    lengths = range(min(longest - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)


def text_prompt(
    tokenizer: Tokenizer,
    text: str,
    max_new_tokens: int,
    settings: GenerationSettings,
    vocab_size: int,
    option: str = "--prompt",
) -> Prompt:
    """Return the prompt that a text is for a model with `vocab_size` real ids. That of an empty one is the token that begins
    or ends a text, which is not shown. Raises InputError, which names `option`, if there is no such token, or the text has a
    token that the model lacks."""
    ids = tokenizer.encode(text)
    if not ids:
        if (start := settings.start_id(tokenizer, vocab_size)) is None:
            raise InputError(
                f"{option} is empty, and the tokenizer has no end-of-text token to start from; give some text"
            )
        return Prompt([start], max_new_tokens, hidden_ids=1)
    if (largest := max(ids)) >= vocab_size:
        raise InputError(
            f"{option}: {tokenizer.decode([largest])!r} has the id {largest}, and the model has only {vocab_size} ids; "
            "remove it"
        )
    return Prompt(ids, max_new_tokens)


def drawn_ids(tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> int:
    """Return how many of a model's `vocab_size` real ids, from 0, may be drawn: those that the tokenizer has or that end a
    text."""
    return min(vocab_size, max([tokenizer.vocab_size, *(i + 1 for i in stop_ids if i < vocab_size)]))


def continue_texts(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingConfig,
    *,
    settings: GenerationSettings | None = None,
    seed: int = 0,
    samples: int = 1,
    stop: Sequence[str] = (),
    device: Device | None = None,
    show: Callable[[str], None] = lambda text: None,
) -> list[Continuation]:
    """Return `samples` continuations of each text, as `continue_prompts` does.

    Args:
        settings: which ids begin and end a text; by default, the tokenizer's.

    Raises as `text_prompt` and `generate` do."""
    settings = settings or GenerationSettings.of(tokenizer)
    prompts = [text_prompt(tokenizer, t, max_new_tokens, settings, model.config.real_vocab_size) for t in texts]
    return continue_prompts(
        model, tokenizer, prompts, sampling, stop_ids=settings.stop_ids(tokenizer.eot_id), seed=seed, samples=samples,
        stop=stop, device=device, show=show,
    )  # fmt: skip


def continue_prompts(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    stop_ids: Collection[int],
    seed: int = 0,
    samples: int = 1,
    stop: Sequence[str] = (),
    rows: int = 0,
    width: int = 0,
    device: Device | None = None,
    show: Callable[[str], None] = lambda text: None,
) -> list[Continuation]:
    """Return `samples` continuations of each prompt, in the order of the prompts. All are computed side by side.

    Sample number j of a prompt, counted from 0, draws with seed + j, so its text does not depend on what else is generated.

    Args:
        stop: texts that end a continuation before them.
        show: receives the pieces of the first text as they are generated, beginning with its prompt as it is shown.
        stop_ids, rows, width, device: see `generate`.

    Raises as `generate` does."""
    each = [prompt for prompt in prompts for _ in range(samples)]
    texts = [Continuation(tokenizer, p.ids, stop, p.hidden_ids, p.max_new_tokens) for p in each]
    show(texts[0].prompt)

    def add(row: int, token: int) -> bool:
        new = texts[row].add(token)
        if row == 0:
            show(new)
        return texts[row].stopped or texts[row].is_cut

    steps = generate(
        model, [prompt.ids for prompt in each], max(prompt.max_new_tokens for prompt in each), sampling,
        seeds=[seed + number for _ in prompts for number in range(samples)],
        vocab_size=drawn_ids(tokenizer, model.config.real_vocab_size, stop_ids), stop_ids=stop_ids, ends=add,
        rows=rows, width=width, device=device,
    )  # fmt: skip
    for _ in steps:
        pass
    rests = [text.rest() for text in texts]
    show(rests[0])
    return texts
