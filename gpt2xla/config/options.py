"""What an option is: a field of a dataclass, which is a flag of a command line and a key of a config file.

However an option is given, it arrives as words, and `Option.read` turns them into its value: it expands ~ in paths,
understands other names of a choice, and refuses wrong words.
"""

from __future__ import annotations

import dataclasses
import decimal
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal

from gpt2xla.errors import InputError

OFF = ("no", "off", "false")  # aliases of "none" or "never"; YAML 1.1 reads the first two as the third
# How addresses begin that fsspec knows; those of folders on a machine hardly do.
_PROTOCOL = re.compile(r"(gs|gcs|s3|s3a|hf|az|abfs|https?|file|memory):(//)?", re.IGNORECASE)
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Share(str):
    """A share of something, as the user writes it: 5% or 0.5%, from 0% to 100%. Other words raise ValueError."""

    def __new__(cls, word: str) -> Share:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?%", word) or decimal.Decimal(word[:-1]) > 100:
            raise ValueError
        return super().__new__(cls, word)

    def of(self, whole: int) -> int:
        return round(decimal.Decimal(self[:-1]) * whole / 100)


_METAVARS = {int: "N", float: "X", str: "TEXT", Share: "X%"}


def option(
    default: Any,
    help: str,
    *,
    is_path: bool = False,
    check: Callable[[str, Any], None] | None = None,
    aliases: Mapping[str, str] | None = None,
    joins: bool = False,
    other_names: tuple[str, ...] = (),
    is_positional: bool = False,
) -> Any:
    """Return a dataclass field that is a flag.

    Args:
        default: MISSING makes the flag a required one.
        is_path: whether a leading ~ is the user's home folder.
        check: called with flag and value before anything heavy is imported; raises InputError for a path that is plainly
            wrong (`paths.py`).
        aliases: other words for some of the values.
        joins: whether a list in a config file stands for its parts with commas between them.
        other_names: names that --help does not show but that mean the same, such as the option's earlier ones.
        is_positional: whether its words stand without the flag, which they may also follow."""
    metadata = {
        "help": help, "is_path": is_path, "check": check, "aliases": aliases or {}, "joins": joins,
        "other_names": other_names, "is_positional": is_positional,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def options_of(group: Any) -> list[dataclasses.Field]:
    """Return the fields of a dataclass that are flags."""
    return [f for f in dataclasses.fields(group) if "help" in f.metadata]


def flag(name: str) -> str:
    """Return the flag of an option: `train_dir` -> `--train-dir`."""
    return "--" + name.replace("_", "-")


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def require_at_least(least: int, group: Any, *names: str) -> None:
    """Raise InputError if one of these options of `group` is below `least`, infinite or NaN; None is allowed."""
    for name in names:
        value = getattr(group, name)
        in_range = value is None or least <= value < math.inf
        require(in_range, f"{flag(name)} {value}: choose a number of at least {least}")


def require_at_most(most: int, group: Any, *names: str) -> None:
    """Raise InputError if one of these options of `group` is above `most`."""
    for name in names:
        value = getattr(group, name)
        require(value <= most, f"{flag(name)} {value}: choose a number of at most {most}")


def expanded(path: str) -> str:
    """Return `path` with a leading ~ replaced by the home folder. Raises ValueError if there is no such folder, or if it is
    half a URL: gs:/bucket/run would be a folder on this machine's disk."""
    if protocol := _PROTOCOL.match(path):
        if not protocol[2]:
            raise ValueError(f"{path[:80]!r}: a URL begins with {protocol[0]}//; write ./{protocol[0]} for a folder")
        if not path[protocol.end() :].strip("/"):
            raise ValueError(f"{path[:80]!r}: the URL ends before it names anything; write {protocol[0]}bucket/folder")
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ValueError(f"{path[:80]!r}: ~ is not the home folder of anyone here; write ./~ for a folder of that name")
    return whole


def check_paths(group: Any, names: Iterable[str]) -> None:
    """Run the `check` of those options of a dataclass's instance that `names` holds, in this order. Raises InputError."""
    found = {f.name: f for f in options_of(group)}
    for name in names:
        if name in found and (check := found[name].metadata["check"]) and (value := getattr(group, name)) is not None:
            check(flag(name), value)


@dataclass(frozen=True)
class Option:
    """One option of a dataclass. For the last six see `option`."""

    name: str
    kind: Any  # the type of its value, without the None that a default may be
    default: Any
    help: str
    is_path: bool
    check: Callable[[str, Any], None] | None
    aliases: Mapping[str, str]
    joins: bool
    other_names: tuple[str, ...]
    is_positional: bool

    @classmethod
    def all_of(cls, group: Any) -> dict[str, Option]:
        """Return the options of a dataclass by name, in the order of its fields."""
        kinds = typing.get_type_hints(group)
        return {f.name: cls(f.name, _without_none(kinds[f.name]), f.default, **f.metadata) for f in options_of(group)}

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def count(self) -> int | None:
        """How many words make a value; None means one or more."""
        if typing.get_origin(self.kind) is not tuple:
            return 1
        parts = typing.get_args(self.kind)
        return None if parts[1:] == (...,) else len(parts)

    @property
    def takes(self) -> str:
        """What a word may be, in words for the user."""
        return _described(self._kind_of_word)

    def read(self, words: Sequence[str]) -> Any:
        """Return the value of `words`. Raises ValueError, whose message says what is wrong and what to write."""
        if self.count not in (None, len(words)) or not words:
            number = {None: "one value or more", 1: "one value"}.get(self.count, f"{self.count} values")
            raise ValueError(f"takes {number}, not {len(words)}")
        values = tuple(self._read_word(word) for word in words)
        return values if typing.get_origin(self.kind) is tuple else values[0]

    def _read_word(self, word: str) -> Any:
        kind, named = self._kind_of_word, self.aliases.get(word.lower(), word)
        for part in typing.get_args(kind) if _is_union(kind) else (kind,):
            try:
                value = _read(part, named)
            except (ValueError, ArithmeticError):
                continue
            return expanded(value) if self.is_path else value
        raise ValueError(f"{word[:80]!r}: choose {self.takes}")

    @property
    def metavar(self) -> str:
        """What stands for one word of the value in --help."""
        kind = self._kind_of_word
        if typing.get_origin(kind) is Literal:
            return f"{{{','.join(typing.get_args(kind))}}}"
        if _is_union(kind):
            number, other = typing.get_args(kind)
            return f"{_METAVARS[number]}|{_METAVARS.get(other) or '|'.join(typing.get_args(other))}"
        return "PATH" if self.is_path else _METAVARS[kind]

    @property
    def _kind_of_word(self) -> Any:
        return typing.get_args(self.kind)[0] if typing.get_origin(self.kind) is tuple else self.kind


def check_types(group: Any) -> None:
    """Raise InputError if an option's value is not of its type: those that come from a checkpoint were not read as words."""
    kinds = typing.get_type_hints(type(group))
    for f in options_of(group):
        if not _fits(value := getattr(group, f.name), kinds[f.name]):
            shown = repr(value)[:80]
            raise InputError(f"{flag(f.name)} {shown} is of the wrong kind or size; --help says what it takes")


def _read(kind: Any, word: str) -> Any:
    if typing.get_origin(kind) is Literal:
        if word not in typing.get_args(kind):
            raise ValueError
        return word
    if kind is bool:
        if word.lower() not in _TRUTH:
            raise ValueError
        return _TRUTH[word.lower()]
    return _whole_number(word) if kind is int else kind(word)


def _whole_number(word: str) -> int:
    """Read a whole number, which 1e3 is too; float() would round large ones."""
    try:
        return int(word)
    except ValueError:
        number = decimal.Decimal(word)
        if number.is_finite() and abs(number.adjusted()) < 30 and number == number.to_integral_value():
            return int(number)
        raise


def _described(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(map(_described, typing.get_args(kind)))
    if typing.get_origin(kind) is Literal:
        *first, last = typing.get_args(kind)
        return f"{', '.join(first)} or {last}" if first else last
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Share: "a share such as 5%"}
    return names[kind]


def _without_none(kind: Any) -> Any:
    if not _is_union(kind):
        return kind
    parts = [part for part in typing.get_args(kind) if part is not NoneType]
    return typing.Union[tuple(parts)]  # noqa: UP007  the number of parts varies


def _is_union(kind: Any) -> bool:
    return bool(typing.get_args(kind)) and typing.get_origin(kind) not in (tuple, Literal)


def _fits(value: Any, kind: Any) -> bool:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in parts
    if typing.get_origin(kind) is tuple:
        kinds = parts[:1] * len(value) if parts[1:] == (...,) and isinstance(value, tuple) else parts
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if parts:
        return any(_fits(value, part) for part in parts)
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind) and (kind is not str or _can_name_a_file(value))


def _can_name_a_file(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character, as YAML and JSON can spell
        return False
