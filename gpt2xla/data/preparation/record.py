"""The record of a preparation, from which an interrupted one is resumed and a finished one is recognised."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from gpt2xla.config import flag
from gpt2xla.data.documents.corpus import InputFile, Position, Split
from gpt2xla.data.preparation.writer import Written
from gpt2xla.data.shards import as_json
from gpt2xla.errors import InputError
from gpt2xla.files import write_whole

SPLITS: tuple[Split, ...] = get_args(Split)
RECORD = "preparation.json"
_FORMER_FRACTION = 0.01  # what older records say where --test-fraction was left out


@dataclass
class Record:
    """How far a preparation has come.

    Attributes:
        settings: the options that decide what is written.
        parts: name, size and reading of each part of the corpus that was begun; the last one may not be finished.
        position: the place in the corpus up to which documents are written.
        splits: what is written, by split.
        spelled: how often each special token was met and taken as text.
    """

    settings: dict[str, Any]
    parts: list[tuple[str, int, str]]
    position: Position
    splits: dict[Split, Written]
    spelled: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return sum(written.tokens for written in self.splits.values())

    def as_text(self, **further: Any) -> str:
        """Return the record as JSON, with `further` values beside it, which `parse` passes over."""
        return json.dumps(vars(self) | further, indent=2, default=as_json)

    def save(self, folder: Path) -> None:
        write_whole(folder / RECORD, self.as_text())

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """Return the record in `folder`; None if there is none. Raises InputError if it is damaged."""
        file = folder / RECORD
        return cls.parse(file.read_bytes(), str(file)) if file.exists() else None

    @classmethod
    def parse(cls, content: bytes, name: str) -> Record:
        """Return the record that is written in a file or object of this name. Raises InputError if it is damaged."""
        try:
            values = json.loads(content)
            values["settings"].setdefault("special_tokens_in_text", "as-text")  # older records know no other way
            return cls(
                values["settings"],
                [(name, size, how) for name, size, how in values["parts"]],
                Position(*values["position"]),
                {split: Written.from_json(values["splits"][split]) for split in SPLITS},
                Counter(values.get("spelled", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{name} is damaged ({error}); remove its folder and prepare again") from None

    def check(self, settings: dict[str, Any], parts: Sequence[InputFile], place: str, *, complete: bool) -> None:
        """Raise InputError if the preparation in `place` had other options or another corpus.

        `complete` means that it read all parts of its corpus, so that there may be no others now.
        """
        was, fix = f"{place} was prepared", "or remove it, or choose another --output-dir"
        for name, value in settings.items():
            if name == "test_fraction" and value is None and self.settings.get(name) == _FORMER_FRACTION:
                continue
            if self.settings.get(name) != value and name != "tokenizer":
                asked = name.removesuffix("_sha256")
                then, now = (
                    "left to the default" if v is None else v for v in (self.settings.get(asked), settings[asked])
                )
                raise InputError(f"{was} with {flag(asked)} {then}, now {now}; give the same options, {fix}")
        old = [f"{name} of {size:,} bytes, {how}" for name, size, how in self.parts]
        new = [f"{part.name} of {part.size:,} bytes, {part.how}" for part in parts]
        for then, there in itertools.zip_longest(old, new if complete else new[: len(old)], fillvalue="nothing"):
            if then != there:
                raise InputError(f"{was} from {then}, but now there is {there}; give the same input, {fix}")
