"""What the tabs Draw and Recognise share: pictures in the page, and what is there if a model knows no sketches."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Iterator

import gradio as gr
import numpy as np
from PIL import Image

from gpt2xla.errors import InputError
from gpt2xla.playground.events import QUIET
from gpt2xla.playground.models import Models, Opened
from gpt2xla.sketches.format import SketchFormat

_NOT_YET_DRAWN = 2
# Paper, ink, not yet drawn: their red, green and blue. Paper is white on a dark page too, as the canvas is.
_COLORS = [255, 255, 255, 17, 17, 17, 226, 228, 234]


def part_for_sketches(models: Models, chosen: gr.Dropdown) -> gr.Column:
    """Make a part of the page for models that were trained on sketches. With another one, a sentence is in its place."""
    part = gr.Column(visible=bool(models.words(chosen.value)))
    sentence = gr.Markdown(
        "This model was not trained on sketches. Choose another one above.", visible=not models.words(chosen.value)
    )

    def fit(name: str) -> list[object]:
        knows = bool(models.words(name))
        return [gr.Column(visible=knows), gr.Markdown(visible=not knows)]

    chosen.input(fit, chosen, [part, sentence], queue=False, **QUIET)
    return part


@contextlib.contextmanager
def opened_for_sketches(models: Models, name: str) -> Iterator[tuple[Opened, SketchFormat]]:
    """Open a model that was trained on sketches. Raises InputError if it was not, before it is loaded."""
    if not models.words(name):
        raise InputError(f"{name} was not trained on sketches; choose another model")
    with models.opened(name) as opened:
        assert opened.sketches is not None
        yield opened, opened.sketches


def image(picture: np.ndarray, description: str) -> str:
    """Return an `<img>`, crisp at any size, of a (rows, size) array of bool, true for ink. One of fewer rows than `size` is
    still being drawn."""
    rows, size = picture.shape
    pixels = np.full((size, size), _NOT_YET_DRAWN, dtype=np.uint8)
    pixels[:rows] = picture
    png, file = Image.fromarray(pixels), io.BytesIO()
    png.putpalette(_COLORS)
    png.save(file, "png")
    source = base64.b64encode(file.getvalue()).decode()
    return f'<img class="pixels" alt="{html.escape(description)}" src="data:image/png;base64,{source}">'
