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
        self._tokenizer, self._img_end = format.tokenizer, format.img_end
        self._row = format.size if format.has_pieces else format.size + 1
        self._widest = PIECE if format.has_pieces else 0
        row = "0" * format.size if format.has_pieces else "0" * format.size + "\n"
        self._picture = (row * format.size).rstrip("\n")  # its shape: where ink may be, and where newlines must be
        self._ids = _ids_by_shape(format)
        self._lengths = dict.fromkeys(range(format.tokenizer.vocab_size), 0)
        for shape, ids in self._ids.items():
            self._lengths |= dict.fromkeys(ids, len(shape))
        # Whether a picture can be completed from each place in its text, found from the end.
        self._completable = [False] * len(self._picture) + [True]
        for place in reversed(range(len(self._picture))):
            self._completable[place] = bool(self._fitting(place))
        self._masks: dict[tuple[str, ...], Tensor] = {}

    def allowed(self, new_ids: Sequence[int]) -> Tensor:
        """Return which ids may follow, (V,) of bool, on the host: those after which the picture can be completed, and after
        the last pixel only the token that ends it.

        Args:
            new_ids: ids of the picture so far, all of them allowed where they stand."""
        shapes = self._fitting(self._place(new_ids))
        if shapes not in self._masks:
            mask_V = torch.zeros(self._tokenizer.vocab_size, dtype=torch.bool)
            for ids in [self._ids[shape] for shape in shapes] or [[self._img_end]]:
                mask_V[ids] = True
            self._masks[shapes] = mask_V
        return self._masks[shapes]

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        """Tell whether the picture has all its pixels."""
        return self._place(new_ids) == len(self._picture)

    def _place(self, new_ids: Sequence[int]) -> int:
        place = sum(map(self._lengths.__getitem__, new_ids))
        assert place <= len(self._picture)
        return place

    def _fitting(self, place: int) -> tuple[str, ...]:
        """Return the shapes of tokens that may stand at a place of the picture's text, so that it can be completed."""
        width = min(self._widest, self._row - place % self._row)  # of the piece that stands here; 0 if there are none
        return tuple(
            shape
            for shape in self._ids
            if len(shape) == (width or len(shape))
            and self._picture.startswith(shape, place)
            and self._completable[place + len(shape)]
        )


def _ids_by_shape(format: SketchFormat) -> dict[str, list[int]]:
    """Return the ids of all tokens of nothing but pixels and newlines, by their text after other pixels, without the ink."""
    tokenizer = format.tokenizer
    first = int(format.picture_ids(np.zeros((1, format.size, format.size), dtype=bool))[0][0])
    before = tokenizer.decode([first])
    pairs = [[first, number] for number in range(tokenizer.vocab_size)]
    found: dict[str, list[int]] = {}
    for number, text in enumerate(tokenizer.backend.decode_batch(pairs, skip_special_tokens=False)):
        if (new := text.removeprefix(before)) and not set(new) - set("01\n"):
            found.setdefault(new.replace("1", "0"), []).append(number)
    return found
