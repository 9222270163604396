"""Recognise: a canvas, and the words that the model takes the drawing for while it grows."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import numpy as np

from gpt2xla.errors import InputError, RunFailed
from gpt2xla.evals.recognition import Guess, likeliest
from gpt2xla.playground import canvas
from gpt2xla.playground.choices import percent
from gpt2xla.playground.events import on_turn
from gpt2xla.playground.models import Models
from gpt2xla.playground.sketching import image, opened_for_sketches, part_for_sketches
from gpt2xla.sketches.picture_file import picture_from_text, picture_of
from gpt2xla.sketches.strokes import rasterise

_WORDS = 10
_HINT = "Draw on the canvas, or drop or paste an image there."
_LONGEST_TEXT = 10_000
# A visitor's requests are answered one at a time, and of those that wait the newest alone.
_LIVE: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}

# Makes the picture from its size and the width of the lines that the model was trained on.
_Source = Callable[[int, int], np.ndarray]


def tab(models: Models, chosen: gr.Dropdown) -> None:
    """Fill the tab; `chosen` holds the name of the model."""
    with part_for_sketches(models, chosen):
        with gr.Row():
            with gr.Column(min_width=300):
                board = canvas.canvas()
            with gr.Column(min_width=300):
                result = gr.HTML(_shown(), js_on_load=None, elem_id="recognised")
        with gr.Accordion("Paste 0 and 1", open=False):
            text = gr.Textbox(
                show_label=False, placeholder="Rows of 0 and 1", lines=6, max_lines=24, max_length=_LONGEST_TEXT,
                elem_id="zeros-and-ones",
            )  # fmt: skip

    def of_canvas(name: str, sent: object) -> str:
        try:
            held = canvas.read(sent)
        except InputError as error:
            return _shown(str(error))
        if isinstance(held, bytes):
            return _named(models, name, lambda size, width: picture_of(held, "this file", size, width))
        return _named(models, name, lambda size, width: rasterise(held, size, width)) if held else _shown()

    def of_text(name: str, rows: str | None) -> str:
        if not rows:
            return _shown()
        if len(rows) > _LONGEST_TEXT:
            return _shown(f"the text has {len(rows):,} characters; paste one drawing")
        return _named(models, name, lambda size, width: picture_from_text(rows, "this text", size))

    on_turn(models, [board.input, chosen.input], of_canvas, [chosen, board], [result], **_LIVE)
    on_turn(models, [text.change], of_text, [chosen, text], [result], **_LIVE)


def _named(models: Models, name: str, source: _Source) -> str:
    """Return the likeliest words for a picture, or a note on why there are none."""
    try:
        with opened_for_sketches(models, name) as (opened, sketches):
            picture = source(sketches.size, sketches.stroke_width)
            guesses = likeliest(
                opened.model, sketches, picture, _WORDS,
                rows=1, width=opened.config.seq_length, device=opened.device,
            )  # fmt: skip
            return _shown(f"It looks like: {guesses[0].word}", picture, guesses)
    except (InputError, RunFailed) as error:
        return _shown(str(error))


def _shown(note: str = _HINT, picture: np.ndarray | None = None, guesses: Sequence[Guess] = ()) -> str:
    """Return the result as HTML. It has one height, whatever it holds: nothing may jump while one draws."""
    seen = image(np.zeros((1, 1), dtype=np.bool_) if picture is None else picture, "what the model sees")
    rows = [(guess.word, 100 * guess.probability, percent(guess.probability)) for guess in guesses]
    rows += [("", 0.0, "")] * (_WORDS - len(rows))
    bars = "".join(
        f'<li><span class="word">{html.escape(word)}</span><span class="bar"><i style="width: {share:.1f}%"></i></span>'
        f'<span class="share">{html.escape(shown)}</span></li>'
        for word, share, shown in rows
    )
    return (
        f'<div class="seen"><figure>{seen}<figcaption>What the model sees</figcaption></figure>'
        f'<p role="status">{html.escape(note[:1].upper() + note[1:])}</p></div><ol class="words">{bars}</ol>'
    )
