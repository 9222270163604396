"""A picture to recognise, from what a user has: an image, such as a scan or a photograph of paper, or a text of 0 and 1.

It becomes what the model saw in training: (size, size) bool, True where the ink is.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from gpt2xla.errors import InputError, counted, user_error
from gpt2xla.sketches.strokes import rasterise
from gpt2xla.sketches.tokenizer import IMGEND, IMGSTART
from gpt2xla.sketches.tracing import trace

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_KINDS = "a PNG, JPEG, WebP, GIF or BMP image, or a text of 0 and 1"
_MOST_BYTES, _MOST_PIXELS = 64_000_000, 50_000_000  # a file, and an image: those of telephones have as many
_TOO_LARGE = f"has too many pixels; give an image of at most {_MOST_PIXELS // 10**6} million"
_SIDE = 512  # pixels, at least, of the longer side in which ink is looked for
_LEAST_CONTRAST = 24  # of 255: paper and the noise of cameras differ less
_INK = 0.4  # of the largest difference from the paper: what differs more is ink


def read_picture(file: str, size: int, stroke_width: int = 1) -> np.ndarray:
    """Return the picture in `file`, or in standard input if that is "-". Raises InputError as `picture_of` does."""
    name = "standard input" if file == "-" else file
    with user_error(name):
        if file == "-":
            content = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:
                content = stream.read(_MOST_BYTES + 1)
    return picture_of(content, name, size, stroke_width)


def picture_of(content: bytes, name: str, size: int, stroke_width: int = 1) -> np.ndarray:
    """Return the picture in the content of a file. Raises InputError, which begins with `name`, if there is none."""
    if len(content) > _MOST_BYTES:
        raise InputError(f"{name}: more than {_MOST_BYTES // 10**6} MB; give a smaller image")
    if not content.strip():
        raise InputError(f"{name} is empty; give {_KINDS}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is below
        try:
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        except Image.DecompressionBombError:
            raise InputError(f"{name} {_TOO_LARGE}") from None
        except (OSError, ValueError, SyntaxError):
            return picture_from_text(_text(content, name), name, size)
    return picture_from_image(image, name, size, stroke_width)


def picture_from_image(image: Image.Image, name: str, size: int, stroke_width: int = 1) -> np.ndarray:
    """Return the drawing in an image: dark on light or light on dark, in any color, on paper that need not be lit evenly, or
    on nothing. It fills the picture, in lines as wide as in training. An image of size x size is taken as it is.

    Raises InputError if the image is broken, blank or too large."""
    width, height = image.size
    if width * height > _MOST_PIXELS:
        raise InputError(f"{name} ({width:,} x {height:,}) {_TOO_LARGE}")
    if max(width, height) < size:
        raise InputError(f"{name}: {width} x {height} pixels are too few for a drawing; give at least {size} x {size}")
    try:
        image.draft("RGB", (_SIDE, _SIDE))  # a JPEG file is read as a smaller image
        image = _in_bytes(image)
        image = image.reduce(max(1, max(image.size) // _SIDE))
        ink = _ink(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{name}: the image is damaged or cut short ({error}); give another") from None
    if not ink.any():
        raise InputError(f"{name} is blank: nothing in it differs from its background; give a drawing")
    return ink if ink.shape == (size, size) else rasterise(trace(ink), size, stroke_width)


def _in_bytes(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits a channel: as RGBA if some of it may be transparent, else as RGB or L."""
    if image.mode[0] in "IF":  # 16 or 32 bits of grey, which Pillow would cut off at 255
        values = np.asarray(image, np.float32)
        return Image.fromarray((values * (255 / max(float(values.max()), 1.0))).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _ink(image: Image.Image) -> np.ndarray:
    """Tell for each pixel whether it is ink: not of the paper's color there, which may change slowly over the image."""
    values = np.asarray(image if image.mode == "RGBA" else image.convert("RGB"), np.float32)
    if values.shape[2] == 4:
        opacity, values = values[..., 3], values[..., :3]
        is_solid = _stands_out(opacity)
        if is_solid.mean() < 0.5:  # a drawing on nothing
            return is_solid
        values = np.where(is_solid[..., None], values, np.median(values[is_solid], axis=0))
    return _stands_out(np.abs(values - _paper(values)).mean(2))


def _stands_out(difference: np.ndarray) -> np.ndarray:
    largest = float(np.quantile(difference, 0.9995))  # not that of a few pixels
    return difference > (_INK * largest if largest > _LEAST_CONTRAST else 255)


def _paper(values: np.ndarray) -> np.ndarray:
    """Return the color that the paper has at each pixel: what the border is, changing as a polynomial of degree 2, which is
    fitted to the pixels that are near it."""
    small = np.asarray(Image.fromarray(values.astype(np.uint8)).resize((64, 64), Image.Resampling.BOX), np.float32)
    border = np.concatenate([small[:4].reshape(-1, 3), small[-4:].reshape(-1, 3), *small[4:-4, [0, 1, -2, -1]]])
    terms, colors = _terms(64, 64), small.reshape(-1, 3)
    weights = np.zeros((terms.shape[1], 3), np.float32)
    weights[0] = np.median(border, axis=0)
    for _ in range(6):
        difference = np.abs(colors - terms @ weights).mean(1)
        near = difference <= max(_INK * difference.max(), float(np.quantile(difference, 0.3)))
        weights = np.linalg.lstsq(terms[near], colors[near], rcond=None)[0]
    return (_terms(*values.shape[:2]) @ weights).reshape(values.shape)


def _terms(height: int, width: int) -> np.ndarray:
    """Return the six terms of a polynomial of degree 2 at each pixel: (height * width, 6)."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).reshape(-1, 6).astype(np.float32)


def _text(content: bytes, name: str) -> str:
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{name} cannot be read; give {_KINDS}")
    return text


def picture_from_text(text: str, name: str, size: int) -> np.ndarray:
    """Return the picture of `size` rows of `size` characters 0 and 1. Blanks, commas and brackets between them are ignored,
    and what `prepare_sketches.py --as-text` writes around them. Raises InputError if it is no such text or blank."""
    if (count := text.count(IMGSTART)) > 1:
        raise InputError(f"{name} holds {count} drawings; give one")
    text = text.partition(IMGEND)[0].rpartition(IMGSTART)[2]
    rows = [(number, re.sub(r"[\s,;\[\]]", "", line)) for number, line in enumerate(text.splitlines(), 1)]
    rows = [(number, row) for number, row in rows if row]
    for number, row in rows:
        if stray := re.search(r"[^01]", row):
            raise InputError(
                f"{name}: {stray[0]!r} in line {number}; a drawing is written in 0 and 1; give that, or an image"
            )
    if len(rows) == 1 and len(rows[0][1]) == size * size:
        rows = [(1, rows[0][1][start : start + size]) for start in range(0, size * size, size)]
    needed = f"give {size} rows of {size}"
    if len(rows) != size:
        raise InputError(f"{name}: {counted(len(rows), 'row')} of 0 and 1; {needed}")
    for number, row in rows:
        if len(row) != size:
            raise InputError(f"{name}: {counted(len(row), 'character')} in line {number}; {needed}")
    picture = np.array([[character == "1" for character in row] for _, row in rows])
    if not picture.any():
        raise InputError(f"{name} is blank: it holds no 1; give a drawing")
    return picture
