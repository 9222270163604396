"""Documents in JSON that is not lines: an array of objects or texts, or objects one after another, over several lines.

The values are decoded one at a time, so memory is bounded by the longest value, not by the file.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from gpt2xla.data.documents.json_lines import has_half_character, not_text, without_field
from gpt2xla.data.documents.reading_options import LONGEST
from gpt2xla.errors import InputError

_BLOCK_CHARACTERS = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


def read(source: pa.NativeFile, name: str, column: str) -> Iterator[str | None]:
    """Yield the texts in the field `column`, None where an object has none. Raises InputError if no value has the field, or
    one cannot be read."""
    first, has_text = None, False
    with io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as text:
        for number, value in enumerate(Values(text, name), 1):
            document = value.get(column) if isinstance(value, dict) else value
            where = f"{name}, value {number}"
            if not isinstance(document, str | None):
                fix = not_text(document, value, column) if isinstance(value, dict) else "neither an object nor text"
                raise InputError(f"{where}: {fix}")
            if document and not document.isascii() and has_half_character(document):
                raise InputError(f"{where}, holds half a character (\\ud800 to \\udfff, alone); fix or remove it")
            has_text = has_text or document is not None
            first = first or value
            yield document
    if first and not has_text:
        raise InputError(without_field(name, column, first))


class Values:
    """Iterates over the values of a text, called `name` in messages. `buffer` from `at` on is read but not yet used.

    Whole numbers come as floats. Raises InputError if the text is not JSON."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self.text, self.name = text, name
        self.buffer, self.at, self.number = "", 0, 0
        # Some whole numbers have more digits than Python converts to int.
        self.decoder = json.JSONDecoder(parse_int=float)

    def __iter__(self) -> Iterator[Any]:
        if self._next() != "[":
            while self._next():
                yield self._value()
            return
        self.at += 1
        if self._next() == "]":
            self.at += 1
        else:
            yield self._value()
            while (character := self._next()) == ",":
                self.at += 1
                yield self._value()
            if character != "]":
                raise self._error("a comma or ] is missing" if character else "it ends early")
            self.at += 1
        if self._next():
            raise self._error("there is more after its array")

    def _next(self) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            found = _SPACE.match(self.buffer, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._read():
                return ""

    def _value(self) -> Any:
        self._next()
        self.number += 1
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except RecursionError:
                raise self._error("it is nested too deeply") from None
            except json.JSONDecodeError as error:
                if len(self.buffer) - self.at > LONGEST:
                    raise self._error(f"the next one is not JSON, or longer than {LONGEST >> 20} MiB") from None
                if not self._read():
                    raise self._error(error.msg) from None
            else:
                if end < len(self.buffer) or not self._read():  # a number may continue in the next block
                    self.at = end
                    return value

    def _read(self) -> bool:
        """Read as much again as the buffer holds, so that a long value is not decoded again too often; False at the end."""
        waiting = self.buffer[self.at :]
        try:
            more = self.text.read(max(_BLOCK_CHARACTERS, len(waiting)))
        except UnicodeDecodeError:
            raise self._error("bytes that are not UTF-8") from None
        if more:
            self.buffer, self.at = waiting + more, 0
        return bool(more)

    def _error(self, reason: str) -> InputError:
        return InputError(f"{self.name} is not JSON at or after value {self.number} ({reason}); fix or make it again")
