"""Attention as HTML: each head of a layer as a small picture, and one of them large, with its tokens along both sides."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gpt2xla.playground.looking import Look, label

_COLOR = (99, 102, 241)  # seen on light and on dark
_SMALLEST_CELL, _LARGEST_CELL = 9, 22  # pixels of a cell's side
_ROOM = 360  # pixels of the large picture's side, as far as cells allow


def heat_maps(looks: Sequence[Look], layer: int) -> str:
    """Return the heads of layer number `layer`, from 1, or of the last one of a model with fewer. A click on one shows it
    large: see `heat_maps.js`."""
    return f'<div class="figures"><div class="beside">{"".join(_of(one, layer) for one in looks)}</div></div>'


def _of(look: Look, layer: int) -> str:
    layers = len(look.attention)
    number = min(layer, layers)
    heads = [_picture(weights) for weights in look.attention[number - 1]]
    count = look.attention.shape[-1]
    cell = max(_SMALLEST_CELL, min(_LARGEST_CELL, _ROOM // count))
    small = "".join(
        f'<button type="button" class="head" data-head="{n}" aria-pressed="{str(n == 0).lower()}" title="Head {n + 1}">'
        f'<img src="{picture}" alt=""><span>{n + 1}</span></button>'
        for n, picture in enumerate(heads)
    )
    labels = "".join(f"<span>{html.escape(label(piece))}</span>" for piece in look.pieces[:count])
    first = f" The first {count} tokens are shown." if count < len(look.ids) else ""
    return (
        f'<section class="attention"><h3>{html.escape(look.name)}: layer {number} of {layers}, head <b>1</b></h3>'
        f'<div class="heads">{small}</div>'
        f'<div class="scrolled"><div class="heat" style="--cell:{cell}px;--count:{count}">'
        f'<div class="keys">{labels}</div><div class="queries">{labels}</div>'
        f'<img src="{heads[0]}" alt="attention weights" width="{count * cell}" height="{count * cell}"></div></div>'
        f'<p class="note"><output>Point at a cell to read it.</output>{first}</p></section>'
    )


def _picture(weights_SS: np.ndarray) -> str:
    """Return a PNG as a URL: one color, as opaque as the weight is large."""
    image = Image.fromarray(weights_SS, "P")
    image.putpalette(bytes(_COLOR) * 256)
    content = io.BytesIO()
    image.save(content, "PNG", transparency=bytes(range(256)))
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
