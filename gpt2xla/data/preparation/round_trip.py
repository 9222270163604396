"""Does a tokenizer keep text? One with an unknown token, or that lowers case, does not, and a model learns what is left."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from gpt2xla.data.tokenizer import Tokenizer

_CHARACTERS = 50_000
_OF_EACH = 5_000
_SHOWN_BEFORE, _SHOWN_AFTER = 10, 30


def first_loss(tokenizer: Tokenizer, documents: Iterable[str]) -> tuple[str, str] | None:
    """A snippet of the first of `documents` that does not come back from its ids, and what comes back there; None if all do.
    Looks at 50,000 characters; spaces around a document do not count, which some tokenizers add or take."""
    seen = 0
    for document in documents:
        text = document[:_OF_EACH].strip()
        seen += len(text)
        back = tokenizer.decode(tokenizer.encode(text)).strip()
        if back != text:
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, back, strict=False)))
            shown = slice(max(0, same - _SHOWN_BEFORE), same + _SHOWN_AFTER)
            return text[shown], back[shown]
        if seen >= _CHARACTERS:
            break
    return None
