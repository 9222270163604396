"""The canvas that visitors draw on, and what it sends, which is read as what it is: text from somewhere."""

from __future__ import annotations

import base64
import json
from importlib import resources

import gradio as gr
import numpy as np

from gpt2xla.errors import InputError

UNITS = 1000  # coordinates go from 0 to this in steps of 1, as in canvas.js
MOST_BYTES = 8 * 2**20  # of a file
_MOST_CHARACTERS = 200_000  # of strokes as JSON: about 20,000 points

# Widths on the canvas, and the size of the dot that stands for them. The model sees lines as wide as in training, whatever
# pen one takes: with lines of another width it recognises less.
_PENS = "".join(
    f'<label><input type="radio" name="pen" value="{width}" aria-label="{name} pen" {checked}>'
    f'<i style="--dot: {dot}px"></i></label>'
    for name, width, dot, checked in [("Thin", 10, 4, ""), ("Medium", 25, 8, "checked"), ("Thick", 50, 14, "")]
)
_HTML = f"""
<div class="tools">
  <span class="pens" role="radiogroup" title="For your eyes: the model sees lines as wide as those it was trained on">
    {_PENS}
  </span>
  <button type="button" class="undo">Undo</button>
  <button type="button" class="clear">Clear</button>
  <button type="button" class="choose" title="Open an image, or a text of 0 and 1">Open</button>
  <input type="file" accept="image/*,.txt" hidden>
</div>
<canvas width="{UNITS}" height="{UNITS}" tabindex="0" aria-label="Draw here" data-most-bytes="{MOST_BYTES}"></canvas>
"""


def canvas() -> gr.HTML:
    """Make a canvas with its tools. `read` reads its value; its event `input` says that this has changed."""
    script = resources.files(__package__).joinpath("canvas.js").read_text(encoding="utf-8")
    return gr.HTML(html_template=_HTML, js_on_load=script, apply_default_css=False, elem_id="canvas")


def read(value: object) -> list[np.ndarray] | bytes:
    """Return what a canvas sent: its strokes, each an (n, 2) array of whole numbers from 0 to `UNITS`, or a file's bytes.
    Raises InputError if it is anything else, or too much."""
    if not value:
        return []
    try:
        if not isinstance(value, str):
            raise TypeError
        return _file(value) if value.startswith("data:") else _strokes(value)
    except InputError:
        raise
    except (ValueError, TypeError, RecursionError):
        raise InputError("what the canvas sent is neither strokes nor a file; reload the page") from None


def _file(url: str) -> bytes:
    data = base64.b64decode(url[: 2 * MOST_BYTES].partition(",")[2])
    if len(data) > MOST_BYTES:
        raise InputError(f"the file has more than {MOST_BYTES >> 20} MB; take a smaller one")
    return data


def _strokes(text: str) -> list[np.ndarray]:
    if len(text) > _MOST_CHARACTERS:
        raise InputError("the drawing has too many points; clear the canvas and draw fewer lines")
    strokes = [np.array(stroke) for stroke in json.loads(text)]  # numbers past 64 bits make an array of objects
    for points in strokes:
        if points.ndim != 2 or points.shape[1] != 2 or points.dtype.kind != "i":
            raise ValueError("a stroke is a list of [x, y], in whole numbers")
        if points.min() < 0 or points.max() > UNITS:
            raise ValueError("a point lies outside of the canvas")
    return strokes
