"""Finds and counts special tokens that a text spells out, such as `<|user|>`, and words the warning about them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # generation does not need it
    import pyarrow as pa

# How they are read in a text: as letters, as the tokens (like transformers), or as a reason to stop.
SpecialTokensInText = Literal["as-text", "as-ids", "refuse"]

_SHOWN = 5
_SHOWN_CHARACTERS = 60


class SpelledTokens:
    """Finds `tokens` in texts. If one begins with another, the longer one is found."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # Escapes only characters with a meaning in patterns, which both Arrow's RE2 and Python's re accept.
        spelled = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = "|".join(re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", token) for token in spelled)
        self._regex = re.compile(self._pattern)

    def count(self, text: str) -> Counter[str]:
        """Return how often the text spells each token."""
        return Counter(self._regex.findall(text)) if self._pattern else Counter()

    def count_each(self, texts: pa.LargeStringArray) -> dict[int, Counter[str]]:
        """Return the counts of the texts that spell any token, by the text's number. Fast if there are none."""
        import pyarrow.compute as pc

        found = pc.indices_nonzero(self.found_in(texts)).to_pylist()
        return {number: self.count(texts[number].as_py()) for number in found}

    def blanked(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """Return the texts with each token replaced by a space."""
        import pyarrow.compute as pc

        return pc.replace_substring_regex(texts, self._pattern, " ") if self._pattern else texts

    def found_in(self, texts: pa.LargeStringArray) -> pa.BooleanArray:
        """Return for each text whether it spells any token."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self._pattern:
            return pa.array([False] * len(texts), pa.bool_())
        return pc.match_substring_regex(texts, self._pattern)


def shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def warning(counts: Mapping[str, int], where: str) -> str:
    """Return the warning about special tokens that were taken as text."""
    most = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{token} {count:,} x" for token, count in most[:_SHOWN])
    more = f" and {len(most) - _SHOWN} others" if len(most) > _SHOWN else ""
    return (
        f"warning: {where} spells special tokens, which are taken as text: {shown}{more}; with "
        "--special-tokens-in-text as-ids they become the tokens, refuse stops at them"
    )
