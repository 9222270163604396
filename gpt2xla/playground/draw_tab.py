"""Draw: a word becomes pictures, side by side, row by row."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np

from gpt2xla.errors import InputError, counted
from gpt2xla.generation.drawing import draw_rows
from gpt2xla.playground.controls import asked, controls
from gpt2xla.playground.events import QUIET, on_turn
from gpt2xla.playground.models import Models
from gpt2xla.playground.sketching import image, opened_for_sketches, part_for_sketches

_MOST = 16  # pictures at once
_LONGEST_WORD = 100  # characters: each token of it takes as long as one of the picture


def tab(models: Models, chosen: gr.Dropdown) -> None:
    """Fill the tab; `chosen` holds the name of the model."""
    words = models.words(chosen.value)
    with part_for_sketches(models, chosen), gr.Row():
        with gr.Column(scale=2, min_width=300):
            word = gr.Dropdown(
                words, value=words[0] if words else None, label="Word", info="one that the model learned, or any other",
                allow_custom_value=True, elem_id="word",
            )  # fmt: skip
            count = gr.Slider(1, _MOST, 4, step=1, label="Pictures", elem_id="pictures")
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Draw", variant="primary", size="md", scale=0, min_width=80)
                stop = gr.Button("Stop", size="md", scale=0, min_width=80)
            settings = controls(of_text=False)
        with gr.Column(scale=3, min_width=300):
            drawn = gr.HTML(_shown([], "", ["The pictures appear here"]), js_on_load=None, elem_id="drawn")

    def draw(name: str, word: str | None, count: int, *values: Any) -> Iterator[str]:
        """Yield the pictures as they grow."""
        request = asked(*values)
        if not (word := str(word or "").strip()):
            raise InputError("there is no word; choose one, or write one")
        if len(word) > _LONGEST_WORD:
            raise InputError(f"the word has {len(word):,} characters; shorten it to {_LONGEST_WORD}")
        if not 1 <= count <= _MOST:
            raise InputError(f"{count} pictures: choose a number from 1 to {_MOST}")
        with opened_for_sketches(models, name) as (opened, sketches):
            count, size = int(count), sketches.size
            pictures = [np.empty((0, size), dtype=np.bool_)] * count
            seeds = range(request.seed, request.seed + count)
            notes = [f"Seed {request.seed}"] if request.sampling.temperature else []
            if word not in sketches.words:
                notes.append("The model did not learn this word")
            yield _shown(pictures, word, notes)
            # On XLA any number of pictures takes the same programs.
            side_by_side = _MOST if opened.model.kernels.static_shapes else 1
            for pictures in draw_rows(
                opened.model, sketches, [word] * count, request.sampling, seeds, device=opened.device, rows=side_by_side
            ):
                rows = min(map(len, pictures))
                progress = f"Row {rows} of {size}" if rows < size else counted(count, "picture")
                yield _shown(pictures, word, [progress, *notes])

    def offer(name: str, word: str | None) -> object:
        """Offer the model's words, and leave what the visitor has written."""
        words = models.words(name)
        return gr.Dropdown(words) if word or not words else gr.Dropdown(words, value=words[0])

    on_turn(models, [start.click], draw, [chosen, word, count, *settings], [drawn], start=start, stop=stop)
    chosen.input(offer, [chosen, word], word, queue=False, **QUIET)


def _shown(pictures: Sequence[np.ndarray], word: str, notes: Sequence[str]) -> str:
    images = "".join(image(picture, f"a drawing of {word}") for picture in pictures)
    return f'<div class="drawings">{images}</div><p class="note" role="status">{html.escape(". ".join(notes))}</p>'
