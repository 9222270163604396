"""`gpt2xla COMMAND ...`: the programs under one name, after `pip install` or as `python -m gpt2xla`.

Only the chosen program is imported.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from gpt2xla.cli import versions
from gpt2xla.errors import InputError
from gpt2xla.processes.exits import run_and_exit


class Command(NamedTuple):
    """A program: the module with its `main`, and what --help says about it."""

    module: str
    help: str


COMMANDS = {
    "prepare text": Command("commands.prepare_text", "text, JSON, CSV or parquet files -> token shards"),
    "prepare fineweb": Command("commands.prepare_fineweb", "FineWeb or FineWeb-Edu -> token shards"),
    "prepare dataset": Command("commands.prepare_dataset", "a data set from the hub -> token shards"),
    "prepare chat": Command("commands.prepare_chat", "conversations -> rows to train on the answers"),
    "prepare sketches": Command("commands.prepare_sketches", "drawings -> rows of tokens to draw and recognise by"),
    "tokenizer": Command("commands.train_tokenizer", "train a tokenizer on your text"),
    "train": Command("commands.train", "pre-train, resume or validate on GPUs or a CPU"),
    "train-xla": Command("commands.train_xla", "the same on TPUs, through PyTorch/XLA"),
    "generate": Command("commands.generate", "continue text with a model"),
    "recognise": Command("commands.recognise", "name drawings with a model of sketches"),
    "playground": Command("commands.playground", "a page in the browser: write, chat, draw, look inside"),
    "evaluate perplexity": Command("commands.perplexity_table", "loss and perplexity of models on one split"),
    "evaluate hellaswag": Command("commands.eval_hellaswag", "a model's accuracy on HellaSwag"),
    "evaluate mmlu": Command("commands.eval_mmlu", "a model's accuracy on MMLU"),
    "evaluate compare": Command("commands.compare_models", "models side by side: a table, a picture"),
    "inspect": Command("commands.inspect_data", "show what token shards hold, and check them"),
    "plot": Command("commands.plot_loss", "draw the loss of runs"),
    "convert": Command("commands.convert_checkpoint", "any GPT-2 -> a Hugging Face folder"),
    "push": Command("commands.push_to_hub", "a model -> the Hugging Face hub"),
    "doctor": Command("doctor", "look for known problems of this machine"),
    "fit": Command("commands.tpu_compile_check", "does a run fit a TPU? Compiles it without one"),
    "tpu-report": Command("commands.tpu_report", "what this machine's TPU makes of it: a block to paste"),
    "completion": Command("commands.completion", "completion of these commands for bash or zsh"),
}


def main() -> None:
    """Run the command that the process's arguments name, and exit with its exit code."""
    run_and_exit(run)


def run() -> None:
    """Run the command that the process's arguments name."""
    sys.argv[0], words = "gpt2xla", sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        if words[1:]:  # help train
            sys.argv[1:] = [*words[1:], "--help"]
            run()
        else:
            print(_help())
    elif words[0] == "--version":
        print(versions())
    elif words[1:] in (["-h"], ["--help"]) and any(name.startswith(f"{words[0]} ") for name in COMMANDS):
        print(_help(words[0]))
    else:
        name = _named(words)
        # The programs' --help and errors begin with it.
        sys.argv = [f"gpt2xla {name}", *words[len(name.split()) :]]
        main_of(name)()


def main_of(name: str) -> Callable[[], None]:
    """Return the function of a command."""
    return importlib.import_module(f"gpt2xla.{COMMANDS[name].module}").main


def _named(words: list[str]) -> str:
    """Return the command that the first word, or the first two, name. Raises InputError if there is none."""
    for name in (words[0], " ".join(words[:2])):
        if name in COMMANDS:
            return name
    if below := [name.split()[1] for name in COMMANDS if name.startswith(f"{words[0]} ")]:
        if len(words) == 1:
            raise InputError(f"{words[0]} of what? Add {', '.join(below[:-1])} or {below[-1]}")
        fix = _closest(words[1], below, "choose " + " or ".join(below))
        raise InputError(f"{words[0]} {words[1]}: unknown; {fix}")
    first = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    raise InputError(f"{words[0]}: unknown command; {_closest(words[0], first, 'gpt2xla --help lists them')}")


def _closest(word: str, known: list[str], otherwise: str) -> str:
    starts = [name for name in known if len(word) > 2 and name.startswith(word)]
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6) or starts
    return f"did you mean {found[0]}?" if found else otherwise


def _help(first: str = "") -> str:
    rows = (f"  {name:<20} {command.help}" for name, command in COMMANDS.items() if name.startswith(first))
    lines = [
        "usage: gpt2xla COMMAND [OPTIONS]", "", "A TPU-first PyTorch/XLA trainer for GPT-2.", "", *rows, "",
        "gpt2xla COMMAND --help lists the options of a command; --version, the versions.",
    ]  # fmt: skip
    return "\n".join(lines)
