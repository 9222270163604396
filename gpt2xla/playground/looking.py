"""What a model computed along a text, and the text as HTML that shows it: each token shaded and with what was likely in its
place, and the curve of the probabilities of the tokens that came."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt2xla.checkpoint.run_folder import stays_in_documents
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.evals.inside import Inside, look_inside, most_tokens
from gpt2xla.generation.continuation import Continuation
from gpt2xla.playground.chart import Axis, Hint, Series, line_chart, ticks
from gpt2xla.playground.choices import Choice, percent, quoted, tip, token_span
from gpt2xla.playground.models import Opened

_MOST_LABELS = 12  # below a curve
_LONGEST_NAMED = 48  # tokens of a text whose labels are tokens; those of a longer one are numbers


class Look(NamedTuple):
    """What a model computed along a text, with all that is shown of it: the model is not needed again.

    Attributes:
        pieces: the text of each token; empty for one that ends within a character.
        choices: what was likely in the place of each token, the token itself first; then what may follow the last one.
        attention: (layers, heads, S, S) of the first S tokens, 255 for 1: each query's shares of the keys, one row each.
        notes: what the visitor should know about how the text was read."""

    name: str
    ids: list[int]
    pieces: list[str]
    choices: list[list[Choice]]
    log_probs: np.ndarray
    ranks: np.ndarray
    attention: np.ndarray
    notes: list[str]


def look(opened: Opened, ids: Sequence[int], tokenizer: Tokenizer) -> Look:
    """Read a text of at least one id, or its beginning if it is longer than is shown. `tokenizer` is the model's own, or one
    that reads special tokens."""
    model = opened.model
    # Generation does not ask: each of its texts is one document.
    model.end_of_text = tokenizer.eot_id if stays_in_documents(opened.folder) else None
    inside = look_inside(model, ids[: most_tokens(model)], opened.device)
    notes = []
    if len(ids) > len(inside.ids):
        notes.append(f"The text has {len(ids):,} tokens; the first {len(inside.ids):,} are shown.")
    if model.end_of_text in inside.ids[1:]:
        notes.append("What comes before an end-of-text token is not seen after it, as in this model's training.")
    attention = np.round(inside.attention * 255).astype(np.uint8)
    return Look(
        opened.name, inside.ids, _pieces(tokenizer, inside.ids), _choices(tokenizer, inside), inside.log_probs,
        inside.ranks, attention, notes,
    )  # fmt: skip


def label(piece: str) -> str:
    """Return a token's text for a place without room: without blanks around it, unless it is nothing else."""
    if not piece:
        return "…"
    return piece.strip(" ").replace("\n", "⏎").replace("\t", "⇥") or "␣"


def side_by_side(looks: Sequence[Look]) -> str:
    """Return the text as each model sees it, and the curves: in one chart if the tokens are the same."""
    texts = "".join(_text(one) for one in looks)
    charts = [looks] if len({tuple(one.ids) for one in looks}) == 1 else [[one] for one in looks]
    curves = "".join(_curve(some, first) for first, some in enumerate(charts) if len(some[0].ids) > 1)
    return f'<div class="figures"><div class="beside">{texts}</div>{curves}</div>'


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    text = Continuation(tokenizer, ())
    pieces = [text.add(token) for token in ids]
    pieces[-1] += text.rest()
    return pieces


def _choices(tokenizer: Tokenizer, inside: Inside) -> list[list[Choice]]:
    likely = [
        [Choice(i, quoted(tokenizer, i), math.exp(log_prob)) for i, log_prob in zip(ids, log_probs, strict=True)]
        for ids, log_probs in zip(inside.candidates.tolist(), inside.candidate_log_probs.tolist(), strict=True)
    ]
    came = [Choice(i, quoted(tokenizer, i), math.exp(p)) for i, p in zip(inside.ids, inside.log_probs, strict=True)]
    after = [[one, *(c for c in some if c.token != one.token)] for one, some in zip(came[1:], likely[:-1], strict=True)]
    return [[], *after, likely[-1]]


def _text(look: Look) -> str:
    spans = [token_span(look.pieces[0] or "…", "nothing comes before the first token", 1.0)]
    for piece, choices in zip(look.pieces[1:], look.choices[1:-1], strict=True):
        spans.append(token_span(piece or "…", tip(choices, choices[0].token), choices[0].probability))
    spans.append(token_span("▸", f"what may follow\n{tip(look.choices[-1])}", 1.0, "next"))
    loss = f"{_loss(look)}. " if len(look.ids) > 1 else ""
    return (
        f'<section><h3>{html.escape(look.name)}</h3><div class="written">{"".join(spans)}</div>'
        f'<p class="note">{loss}{html.escape(" ".join(look.notes))}</p></section>'
    )


def _loss(look: Look) -> str:
    loss = -float(np.mean(look.log_probs[1:]))
    perplexity = f", perplexity {math.exp(loss):.3g}" if loss < 20 else ""
    return f"{len(look.ids):,} tokens, {loss:.2f} nats a token{perplexity}"


def _curve(looks: Sequence[Look], color: int) -> str:
    """Return the chart of texts with the same tokens."""
    count, pieces = len(looks[0].ids), looks[0].pieces
    shown: list[tuple[float, str]]
    if count <= _LONGEST_NAMED:
        shown = [(t, label(pieces[t])) for t in range(1, count, -(-(count - 1) // _MOST_LABELS))]
    else:
        shown = [(tick - 1, f"{tick:,.0f}") for tick in ticks(0, count, _MOST_LABELS) if tick > 0]
    series = [
        Series(one.name, color + n, np.arange(1, count), np.exp(one.log_probs[1:])) for n, one in enumerate(looks)
    ]
    hints = [Hint(t - 0.5, t + 0.5, "\n".join(_hint(one, t) for one in looks)) for t in range(1, count)]
    title = "Probability of the token that came"
    y = Axis(0, 1, [(0, "0%"), (0.5, "50%"), (1, "100%")])
    return line_chart(title, series, Axis(0.5, count - 0.5, shown), y, hints)


def _hint(look: Look, t: int) -> str:
    came, rank = look.choices[t][0], int(look.ranks[t])
    place = "the likeliest" if rank == 0 else f"{rank:,} likelier"
    return f"{t + 1}: {came.text} {percent(came.probability)}, {place} ({look.name})"
