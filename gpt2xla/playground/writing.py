"""A text while a model writes it, token by token, and as HTML that shows what the model thought of each token."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Iterator

from torch import Tensor

from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.generation.continuation import Continuation, Prompt, drawn_ids
from gpt2xla.generation.decoding import generate
from gpt2xla.playground.choices import Choice, likeliest, tip, token_span
from gpt2xla.playground.controls import Asked
from gpt2xla.playground.models import Opened


def continued(
    opened: Opened,
    text: Continuation,
    prompt: Prompt,
    asked: Asked,
    stop_ids: Collection[int],
    watch: Callable[[int, Tensor, int], None] = lambda row, logits_V, token: None,
) -> Iterator[str]:
    """Continue `text`, which begins with `prompt`, and yield what each token adds to it; then what was held back. On XLA all
    texts of a model take the same two programs. `watch` is that of `generate`."""
    pieces: list[str] = []

    def ends(row: int, token: int) -> bool:
        pieces.append(text.add(token))
        return text.stopped or text.is_cut

    steps = generate(
        opened.model, [prompt.ids], prompt.max_new_tokens, asked.sampling, seeds=asked.seed,
        vocab_size=drawn_ids(opened.tokenizer, opened.config.real_vocab_size, stop_ids), stop_ids=stop_ids, ends=ends,
        watch=watch, rows=1, width=opened.config.seq_length, device=opened.device,
    )  # fmt: skip
    for _ in steps:
        yield pieces.pop()
    yield text.rest()


class ShadedText:
    """A text as HTML that only grows: new tokens are shaded by how unlikely they were, and carry the likeliest ones.

    Attributes:
        html: as far as it goes; the browser closes what is open."""

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self._tokenizer = tokenizer
        self._drawn: list[list[Choice]] = []  # of tokens whose text is not there yet, what was possible
        self.html = f'<div class="written"><span class="prompt">{html.escape(prompt)}</span>'

    def watch(self, row: int, logits_V: Tensor, token: int) -> None:
        """Take note of a token that was drawn. See `generate`."""
        self._drawn.append(likeliest(logits_V, self._tokenizer, drawn=token))

    def add(self, piece: str) -> None:
        """Add the text that the tokens since the last piece made, if any."""
        if piece:
            self._span(piece)

    def end(self, note: str, *, shows_end: bool) -> None:
        """Add a note below the text, and `shows_end`, a mark for the token that ended it."""
        if shows_end and self._drawn:
            self._span("■")
        self.html += f'</div><p class="note">{html.escape(note)}</p>'

    def _span(self, piece: str) -> None:
        likely = min((choices[0].probability for choices in self._drawn), default=1.0)
        about = "\n\n".join(tip(choices, choices[0].token) for choices in self._drawn)
        self.html += token_span(piece, about, likely)
        self._drawn = []
