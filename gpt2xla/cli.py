"""The command line, made from the dataclasses of `config.py`.

Presets and YAML files are read as flags written down elsewhere: they go through the same parser, in the order
file's preset, file, command line's preset, command line; the later wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from gpt2xla.config import GROUPS, PRESETS, RunConfig, flag, options_of
from gpt2xla.errors import InputError

Options = TypeVar("Options")

_SCALARS = (str, int, float, datetime.date, type(None))  # a run's name may look like a date
_PRETRAIN = "Pre-train GPT-2, go on with a run, or (--do-test) validate a checkpoint."


def parse_run(
    runtime_group: type[Options], argv: Sequence[str] | None = None, description: str = _PRETRAIN
) -> tuple[RunConfig, Options]:
    """The run and the runner's own options, as `argv` (default: the process's arguments) asks for them.

    Raises:
        InputError: a flag, preset or file is wrong.
    """
    parser = _parser(runtime_group, description)
    given = vars(parser.parse_args(argv))
    options: dict[str, Any] = {}
    if file := given.pop("config", None):
        try:
            options = _expand_preset(vars(parser.parse_args(_file_as_flags(Path(file)))))
        except InputError as error:
            raise InputError(f"--config {file}: {error}") from None
    options |= _expand_preset(given)
    runtime_names = {f.name for f in dataclasses.fields(runtime_group)}  # type: ignore[arg-type]
    runtime = runtime_group(**{name: options.pop(name) for name in runtime_names & options.keys()})
    return RunConfig.from_flat(options), runtime


def _expand_preset(given: dict[str, Any]) -> dict[str, Any]:
    return PRESETS.get(given.pop("preset", ""), {}) | given


def _file_as_flags(file: Path) -> list[str]:
    """`train_dir: x` -> `--train-dir x`; keys may be spelled with dashes; an empty value leaves the default."""
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError("is nested too deeply; write lines such as 'seq_length: 1024'") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, or a date of a 13th month
        raise InputError(f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise InputError("holds no options; write lines such as 'seq_length: 1024'")
    argv: list[str] = []
    for key, value in options.items():
        name = flag(str(key))
        if name == "--config":
            raise InputError("a config file cannot name another one")
        if value is True or value is False:
            argv.append(name if value else name.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            raise InputError(f"{name} has options below it; write all options side by side")
        elif not all(isinstance(part, _SCALARS) for part in (value if isinstance(value, list) else [value])):
            raise InputError(f"{name} is neither text, a number nor a list of these")
        elif value is not None:
            argv += [name, *map(str, value)] if isinstance(value, list) else [f"{name}={value}"]
    return argv


def parse_options(group: type[Options], description: str, argv: Sequence[str] | None = None) -> Options:
    """A program's options when they are one dataclass. Raises InputError for a wrong flag."""
    parser = OneLineParser(description=description)
    add_group(parser, group)
    return group(**vars(parser.parse_args(argv)))


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and an InputError instead of the usage text and an exit."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, width=110), **kwargs
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')} (--help lists the flags)")


def add_group(parser: argparse.ArgumentParser, group: type) -> None:
    """Add one dataclass as one titled group of flags. Flags not given stay out of the namespace; a field without a
    default is a required flag."""
    target = parser.add_argument_group((group.__doc__ or "").strip())
    types_by_name = typing.get_type_hints(group)
    for f in options_of(group):
        target.add_argument(
            flag(f.name),
            dest=f.name,
            default=argparse.SUPPRESS,
            required=f.default is dataclasses.MISSING,
            help=f.metadata["help"] + _show_default(f.default),
            **_argument(types_by_name[f.name]),
        )


def _parser(runtime_group: type, description: str) -> OneLineParser:
    parser = OneLineParser(description=description)
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="YAML or JSON file of options by flag name; flags on the command line override it",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=list(PRESETS), default=argparse.SUPPRESS,
        help="model options of one of OpenAI's four sizes; other flags override it",
    )  # fmt: skip
    for group in (*GROUPS.values(), runtime_group):
        add_group(parser, group)
    return parser


def _argument(kind: Any) -> dict[str, Any]:
    """What argparse needs to read one value of type `kind`."""
    if type(None) in typing.get_args(kind):  # the flag is either given or absent
        (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is tuple:
        element, *rest = typing.get_args(kind)
        count = {"nargs": "+"} if rest == [...] else {"nargs": 1 + len(rest), "metavar": ("B1", "B2")}
        return {"type": element, "action": _StoreTuple, **count}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": list(typing.get_args(kind))}
    if parts := typing.get_args(kind):  # a number, or one of some words
        number, words = parts
        return {"type": _NumberOr(number, typing.get_args(words)), "metavar": f"N|{'|'.join(typing.get_args(words))}"}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


class _NumberOr:
    """An argparse type; argparse names it where a value is wrong."""

    def __init__(self, number: type, words: Sequence[str]) -> None:
        self.number, self.words = number, words
        self.__name__ = f"{number.__name__} or {' or '.join(words)}"

    def __call__(self, text: str) -> Any:
        return text if text in self.words else self.number(text)


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _show_default(default: Any) -> str:
    if default is None or default is dataclasses.MISSING:
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
