"""Special tokens that a text spells out, such as `<|user|>`: found and counted, and the words to say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # generation does without it
    import pyarrow as pa

# What they are in a text: letters like others, the tokens (as transformers reads them), or a reason to stop.
SpecialTokensInText = Literal["as-text", "as-ids", "refuse"]

_SHOWN = 5
_SHOWN_CHARACTERS = 60


class SpelledTokens:
    """Looks for `tokens` in texts; where one begins with another, for the longer one."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # Only signs that mean something in a pattern are escaped: Arrow's RE2 and Python's re both read these.
        spelled = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = "|".join(re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", token) for token in spelled)
        self._regex = re.compile(self._pattern)

    def count(self, text: str) -> Counter[str]:
        return Counter(self._regex.findall(text)) if self._pattern else Counter()

    def count_each(self, texts: pa.LargeStringArray) -> dict[int, Counter[str]]:
        """By the number of the text, of those that spell any. Where there are none this takes next to no time."""
        import pyarrow.compute as pc

        found = pc.indices_nonzero(self.found_in(texts)).to_pylist()
        return {number: self.count(texts[number].as_py()) for number in found}

    def occur_in(self, texts: pa.LargeStringArray) -> bool:
        return bool(self.found_in(texts).true_count)

    def blanked(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """Each text with a space in the place of every token."""
        import pyarrow.compute as pc

        return pc.replace_substring_regex(texts, self._pattern, " ") if self._pattern else texts

    def found_in(self, texts: pa.LargeStringArray) -> pa.BooleanArray:
        """Of each text, whether it spells any."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self._pattern:
            return pa.array([False] * len(texts), pa.bool_())
        return pc.match_substring_regex(texts, self._pattern)


def shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def warning(counts: Mapping[str, int], where: str) -> str:
    """For the user, of tokens taken as text."""
    most = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{token} {count:,} x" for token, count in most[:_SHOWN])
    more = f" and {len(most) - _SHOWN} others" if len(most) > _SHOWN else ""
    return (
        f"warning: {where} spells special tokens, which are taken as text: {shown}{more}; --special-tokens-in-text as-ids "
        "makes them the tokens, refuse stops at them"
    )
