"""Which ids may follow in a picture, so that it has exactly as many rows and pixels as it should.

It holds for every tokenizer: an id may follow if its text fits where the picture stands. Shape suffix: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.tokenizer import PIECE


class PictureGrammar:
    """Knows which ids may follow in a picture of a `SketchFormat`."""

    def __init__(self, format: SketchFormat) -> None:
        self._format = format
        self._texts = _texts_of_pixels(format)
        size = format.size
        self._row = size if format.has_pieces else size + 1
        self._whole = ("0" * size if format.has_pieces else "0" * size + "\n") * size
        self._whole = self._whole.rstrip("\n")
        # Whether a picture can be completed from each of its places, found from its end.
        self._completable = [False] * len(self._whole) + [True]
        self._masks: dict[int, Tensor] = {}
        lengths = np.zeros(format.tokenizer.vocab_size, dtype=np.int64)
        for text, ids in self._texts.items():
            lengths[ids] = len(text)
        self._lengths = lengths
        shapes = {text.replace("1", "0") for text in self._texts}
        for place in reversed(range(len(self._whole))):
            self._completable[place] = any(self._fits(shape, place) for shape in shapes)

    def allowed(self, new_ids: Sequence[int]) -> Tensor:
        """Return which ids may follow, (V,) of bool, on the host: those after which the picture can be completed, and after
        the last pixel only the token that ends it.

        Args:
            new_ids: ids of the picture so far, all of them allowed where they stand."""
        place = int(self._lengths[list(new_ids)].sum())
        assert place <= len(self._whole)
        if place not in self._masks:
            mask_V = torch.zeros(self._format.tokenizer.vocab_size, dtype=torch.bool)
            if place == len(self._whole):
                mask_V[self._format.img_end] = True
            for text, ids in self._texts.items():
                if self._fits(text.replace("1", "0"), place):
                    mask_V[ids] = True
            self._masks[place] = mask_V
        return self._masks[place]

    def _fits(self, shape: str, place: int) -> bool:
        """Tell whether text with ink wherever may stand at a place, so that the picture can be completed after it."""
        end = place + len(shape)
        if self._format.has_pieces and len(shape) != min(PIECE, self._row - place % self._row):
            return False
        return self._whole[place:end] == shape and self._completable[end]


def _texts_of_pixels(format: SketchFormat) -> dict[str, list[int]]:
    """Return the ids of all tokens of nothing but pixels and newlines, by their text after other pixels."""
    tokenizer = format.tokenizer
    first = int(format.picture_ids(np.zeros((1, format.size, format.size), dtype=bool))[0][0])
    before = tokenizer.decode([first])
    decoded = tokenizer.backend.decode_batch(
        [[first, number] for number in range(tokenizer.vocab_size)], skip_special_tokens=False
    )
    found: dict[str, list[int]] = {}
    for number, text in enumerate(decoded):
        if (new := text.removeprefix(before)) and not set(new) - set("01\n"):
            found.setdefault(new, []).append(number)
    return found
