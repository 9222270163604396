"""Completion for a shell: `eval "$(gpt2xla completion bash)"` in ~/.bashrc; zsh reads it from a file _gpt2xla in $fpath."""

from __future__ import annotations

import argparse

from gpt2xla.cli import OneLineParser, parser_of
from gpt2xla.errors import InputError


def main() -> None:
    parser = OneLineParser(description="Print a script that lets a shell complete gpt2xla's commands and options.")
    parser.add_argument("shell", choices=["bash", "zsh"], metavar="SHELL", help="bash or zsh")
    shell = parser.parse_args().shell
    try:
        import shtab
    except ImportError:
        raise InputError("completion needs shtab; pip install 'gpt2xla[completion]'") from None
    print(shtab.complete(_all_commands(shtab.FILE), shell))


def _all_commands(files: dict[str, str]) -> argparse.ArgumentParser:
    """Return a parser of everything: that of each command below the words of its name. `files` marks what takes a path."""
    from gpt2xla.commands.dispatch import COMMANDS, main_of

    root = argparse.ArgumentParser(prog="gpt2xla")
    below = {"": root.add_subparsers()}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in below:
            below[group] = below[""].add_parser(group, help=f"{group} ...").add_subparsers()
        own = parser_of(main_of(name))
        for action in own._actions:
            if action.metavar in ("PATH", "DIR", "RUN"):
                action.complete = files  # type: ignore[attr-defined]
        below[group].add_parser(last, help=command.help, parents=[own], add_help=False)
    return root
