"""Drawings as one picture: a grid of them, with the word of each below it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDE, _GAP, _CAPTION = 120, 12, 22  # pixels: about the side of a drawing, the space around it, the height of its word
_LARGEST, _SMALLEST = 14, 8  # of letters
_PAPER, _INK, _LETTERS, _AROUND = 255, 16, 72, 236  # shades of grey


def sketch_picture(pictures: Sequence[np.ndarray], words: Sequence[str], columns: int = 5) -> bytes:
    """Return the PNG of a grid of `columns`. Each picture is (size, size) of bool, true is ink, and has its word below it.
    Twenty take a few kilobytes."""
    size, columns = len(pictures[0]), min(columns, len(pictures))
    side = size * max(1, round(_SIDE / size))  # every pixel is equally large
    width, height = side + _GAP, side + _CAPTION + _GAP
    image = Image.new("L", (columns * width + _GAP, -(-len(pictures) // columns) * height + _GAP), _AROUND)
    draw = ImageDraw.Draw(image)
    for number, (picture, word) in enumerate(zip(pictures, words, strict=True)):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        shades = Image.fromarray(np.where(picture, _INK, _PAPER).astype(np.uint8))
        image.paste(shades.resize((side, side), Image.Resampling.NEAREST), (left, top))
        text, font = _fitting(draw, word, side)
        draw.text((left + side // 2, top + side + _CAPTION // 2), text, _LETTERS, font, anchor="mm")
    buffer = io.BytesIO()
    # The many shades at the edges of letters compress badly, and sixteen look the same.
    image.quantize(16).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _fitting(
    draw: ImageDraw.ImageDraw, word: str, width: int
) -> tuple[str, ImageFont.ImageFont | ImageFont.FreeTypeFont]:
    """Return the word in the largest letters with which it fits, or its beginning in the smallest."""
    for size in range(_LARGEST, _SMALLEST - 1, -1):
        font = ImageFont.load_default(size)
        if draw.textlength(word, font) <= width:
            return word, font
    kept = next(n for n in range(len(word), -1, -1) if draw.textlength(f"{word[:n]}…", font) <= width)
    return f"{word[:kept]}…", font
