"""Does a tokenizer keep text? One with an unknown token, or that lowers case, does not, and a model learns what is left."""

from __future__ import annotations

import os
from collections.abc import Iterable

from gpt2xla.tokenizer import Tokenizer

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
            start = max(0, len(os.path.commonprefix([text, back])) - _SHOWN_BEFORE)
            return tuple(whole[start:][: _SHOWN_BEFORE + _SHOWN_AFTER] for whole in (text, back))  # type: ignore[return-value]
        if seen >= _CHARACTERS:
            break
    return None
