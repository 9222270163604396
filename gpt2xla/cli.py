"""The command line, made from the dataclasses of `config/run.py`.

Options are taken from the file's preset and recipe, the file, the command line's preset and recipe, and the command line; a
later one overrides an earlier one.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gpt2xla import __version__
from gpt2xla.config import GROUPS, PRESETS, RECIPES, Preset, Recipe, RunConfig
from gpt2xla.config.config_file import read_config_file
from gpt2xla.config.options import Option, check_paths, expanded, flag, option
from gpt2xla.config.suggestions import unknown
from gpt2xla.errors import InputError

Options = TypeVar("Options")

_PRETRAIN = "Pre-train GPT-2, resume a run, or validate a checkpoint (--do-test)."
# argparse's messages -> our messages.
_REWORDED = (
    (r"expected (?:at least )?(?:one|1) argument", "has no value; add one, or write {flag}=... if it begins with -"),
    (r"expected (\d+) arguments", r"takes \1 values; add what is missing"),
    (r"ignored explicit argument .*", "takes no value; write {flag} alone"),
    (r"the following arguments are required: (.*)", r"add \1: it has no default"),
    (r"invalid int value: (.*)", r"\1: choose a whole number"),
    (r"invalid float value: (.*)", r"\1: choose a number"),
    (r"invalid choice: (.*) \(choose from (.*)\)", r"\1: choose \2"),
)


@dataclass(frozen=True)
class SourceConfig:
    """Where options come from"""

    config: str | None = option(
        None, "YAML or JSON file of options by flag name; flags on the command line override it", is_path=True
    )
    preset: Preset | None = option(
        None, "take the model options of one of OpenAI's four sizes; other flags override them"
    )
    recipe: Recipe | None = option(
        None,
        "take the optimizer's options of a recipe: gpt2 is the published one, fast has the lower loss after as many tokens "
        "and instruct tunes a trained model (docs/optimizers.md); other flags override them",
    )


def parse_run(
    runtime_group: type[Options], argv: Sequence[str] | None = None, description: str = _PRETRAIN
) -> tuple[RunConfig, Options]:
    """Return the run and the runner's own options that `argv` asks for; by default, the process's arguments. Raises
    InputError if a flag, preset or file is wrong."""
    groups = (SourceConfig, *GROUPS.values(), runtime_group)
    given = _parse(groups, description, argv)
    options: dict[str, Any] = {}
    if file := given.pop("config", None):
        known = {name: found for group in groups for name, found in Option.all_of(group).items() if name != "config"}
        try:
            options = _expand(read_config_file(Path(file), known))
        except InputError as error:
            raise InputError(f"--config {file}: {error}") from None
    for name, rival in (("epochs", "train_steps"), ("train_steps", "epochs")):  # either sets the run's length
        if name in given and rival not in given:
            options.pop(rival, None)
    options |= _expand(given)
    runtime_names = {f.name for f in dataclasses.fields(runtime_group)}  # type: ignore[arg-type]
    runtime = runtime_group(**{name: options.pop(name) for name in runtime_names & options.keys()})
    return RunConfig.from_flat(options), runtime


def _expand(given: dict[str, Any]) -> dict[str, Any]:
    return PRESETS.get(given.pop("preset", ""), {}) | RECIPES.get(given.pop("recipe", ""), {}) | given


def parse_options(group: type[Options], description: str, argv: Sequence[str] | None = None) -> Options:
    """Return the options of a program whose options are one dataclass. Raises InputError for a wrong flag or path."""
    given = _parse((group,), description, argv, joins_lists=True)  # --input a --input b: neither is lost
    options = group(**given)
    check_paths(options, given)
    return options


def _parse(
    groups: Sequence[type], description: str, argv: Sequence[str] | None, *, joins_lists: bool = False
) -> dict[str, Any]:
    """Return the values of the options that `argv` gives."""
    parser = OneLineParser(description=description)
    options: dict[str, Option] = {}
    for group in groups:
        add_group(parser, group, joins_lists=joins_lists)
        options |= Option.all_of(group)
    values = {}
    given, mistake = parser.parse(argv)
    for name, words in vars(given).items():
        try:
            values[name] = words if isinstance(words, bool) else options[name].read(words)
        except ValueError as error:
            raise InputError(f"{flag(name)} {error}") from None
    if mistake:
        raise InputError(mistake)
    return values


class _Version(argparse.Action):
    """--version: prints the versions that decide what a run does. torch and torch_xla are not imported for it."""

    def __call__(self, parser: argparse.ArgumentParser, *ignored: Any) -> None:
        print(versions())
        parser.exit()


def versions() -> str:
    """Return the versions of gpt2xla, torch and torch_xla in a line."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"gpt2xla {__version__}"]
    for package in ("torch", "torch_xla"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} is not installed")
    return ", ".join(found)


def _width() -> int:
    """Return the columns of --help: those of the terminal, but lines longer than these are hard to read."""
    return min(110, shutil.get_terminal_size((112, 24)).columns - 2)


class _Caught(Exception):
    """Carries a parser out of the program that made it."""


def parser_of(main: Callable[[], None]) -> argparse.ArgumentParser:
    """Return the parser that a program makes, without running the rest of the program."""
    OneLineParser.is_wanted = True
    try:
        main()
    except _Caught as caught:
        return caught.args[0]
    finally:
        OneLineParser.is_wanted = False
    raise AssertionError("a program parses before it does anything else")


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser, which raises a mistake as an InputError of one line instead of printing the usage and exiting.

    Flags may be spelled with underscores. `other_names` maps flags that --help does not show to those that they mean; ""
    stands for the arguments without a flag."""

    is_wanted = False  # whether `parser_of` waits for it

    def __init__(self, other_names: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, width=_width()), **kwargs
        )
        self.other_names = dict(other_names or {})
        self._mistake = ""
        self.add_argument(
            "--version", action=_Version, nargs=0, default=argparse.SUPPRESS,
            help="show the versions of gpt2xla and torch, and exit",
        )  # fmt: skip

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, mistake = self.parse(args)
        if mistake:
            raise InputError(mistake)
        return found

    def parse(self, args: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
        """Return the values of the flags, and what is wrong with the first word that belongs to no flag, if any."""
        if self.is_wanted:
            raise _Caught(self)
        words = [part for word in (sys.argv[1:] if args is None else args) for part in self._in_our_names(word)]
        known = {string.lstrip("-").replace("-", "_"): string for a in self._actions for string in a.option_strings}
        names = [word.partition("=")[0] for word in words[: words.index("--") if "--" in words else None]]
        flags = [name for name in names if name.startswith("--") and " " not in name and name not in known.values()]
        self._mistake = unknown(flags[0], known) if flags else ""
        found, rest = self.parse_known_args(words)
        if rest and not self._mistake:
            stray = f"{rest[0]!r} belongs to no flag; remove it, or put quotes around a value with spaces"
            self._mistake = unknown(rest[0], known) if rest[0].startswith("-") else stray
        return found, self._mistake

    def _in_our_names(self, word: str) -> list[str]:
        """Return `word`, or the words for it if it is a flag by another name."""
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            return [word]
        dashed = name.replace("_", "-")
        if (ours := self.other_names.get(dashed)) is not None:
            return [ours + equals + value] if ours else [value] if equals else []
        return [dashed + equals + value] if dashed in self._option_string_actions else [word]

    def error(self, message: str) -> NoReturn:
        named = re.fullmatch(r"argument ([^:]*): (.*)", message, re.DOTALL)
        name, problem = named.groups() if named else ("", message)
        for theirs, ours in _REWORDED:
            if found := re.fullmatch(theirs, problem, re.DOTALL):
                if "required" in theirs and self._mistake:  # the missing flag was misspelled
                    raise InputError(self._mistake)
                problem = found.expand(ours.replace("{flag}", name.split("/")[0]))
        raise InputError(f"{name} {problem}".strip())


def path(word: str) -> str:
    """Expand ~ in a path. This is an argparse type."""
    try:
        return expanded(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_group(parser: OneLineParser, group: type, *, joins_lists: bool = False) -> None:
    """Add one dataclass as one titled group of flags, whose values are words for `Option.read`. Flags not given stay out of
    the namespace; a field without a default is a required flag. The last of a repeated flag counts, or `joins_lists`."""
    target = parser.add_argument_group((group.__doc__ or "").strip())
    for name, found in Option.all_of(group).items():
        if found.is_switch:
            reading: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            reading = {"nargs": found.count or "+", "metavar": ("B1", "B2") if found.count == 2 else found.metavar}
            if not found.count and joins_lists:
                reading["action"] = "extend"
        if found.is_positional:
            parser.other_names |= {flag(other): "" for other in (name, *found.other_names)}
            target.add_argument(name, help=found.help, **reading | {"metavar": name.upper()})
            continue
        parser.other_names |= {flag(other): flag(name) for other in found.other_names}
        target.add_argument(
            flag(name),
            dest=name,
            default=argparse.SUPPRESS,
            required=found.default is dataclasses.MISSING,
            help=(found.help + _show_default(found.default)).replace("%", "%%"),
            **reading,
        )


def _show_default(default: Any) -> str:
    if default is dataclasses.MISSING or default in (None, "", ()):
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
