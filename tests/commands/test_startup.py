"""What answers at once: --help and wrong paths, in every program, before anything heavy is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from gpt2xla.commands.dispatch import COMMANDS

HEAVY = ["torch", "torch_xla", "pyarrow", "transformers", "datasets", "numpy", "gradio"]

# Each flag of a path that is not there; what else the program needs stands before it.
WRONG_PATHS = [
    *(
        f"{program} {flag} ./no/such/place"
        for program in ("train", "train-xla")
        for flag in (
            "--train-dir",
            "--valid-dir",
            "--from-checkpoint",
            "--model",
            "--resume",
            "--tokenizer",
            "--config",
        )
    ),
    "train --train-dir a=0.5 b=0.5",
    "train",  # its default folder is not there either
    "generate --model ./no/such/place",
    "generate --model gpt2 --tokenizer ./no/such/place",
    "recognise ./no/such/place --model gpt2",
    "recognise . --model ./no/such/place",
    "recognise . --model gpt2 --tokenizer ./no/such/place",
    "playground --model ./no/such/place",
    "playground --model gpt2 ./no/such/place",
    "playground --model gpt2 --tokenizer ./no/such/place",
    "evaluate perplexity --valid-dir . --model gpt2 ./no/such/place",
    "evaluate perplexity --model gpt2 --valid-dir ./no/such/place",
    "evaluate hellaswag --model ./no/such/place",
    "evaluate hellaswag --model gpt2 --tokenizer ./no/such/place",
    "evaluate mmlu --model gpt2 --data ./no/such/place",
    "evaluate compare . ./no/such/place --mmlu",
    "evaluate compare . . --valid-dir ./no/such/place",
    "convert --output-dir x --model ./no/such/place",
    "inspect ./no/such/place",
    "inspect . --tokenizer ./no/such/place",
    "prepare text --input . --output-dir x --tokenizer ./no/such/place",
    "prepare chat --input . --output-dir x --tokenizer ./no/such/place",
    "prepare sketches --input . --output-dir x --tokenizer ./no/such/place",
]

PROGRAM = """
import contextlib, io, json, sys
from gpt2xla.commands import dispatch
from gpt2xla.processes.exits import exit_code
heavy, found = json.loads(sys.argv[1]), []
for words in json.loads(sys.argv[2]):
    sys.argv = ["gpt2xla", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = exit_code(dispatch.run)
        except SystemExit as end:
            code = end.code
    found.append([words, code, out.getvalue(), err.getvalue(), [name for name in heavy if name in sys.modules]])
json.dump(found, sys.stdout)
"""


def answers(commands: list[list[str]], folder: Path) -> list[list]:
    """Words, exit code, stdout, stderr and heavy modules of each, all in one process, so that none may import any."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(HEAVY), json.dumps(commands)],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout)


def test_help_and_version_import_nothing_heavy(tmp_path: Path) -> None:
    asked = [[*name.split(), flag] for name in COMMANDS for flag in ("--help", "--version")]
    for words, code, out, err, heavy in answers([["--help"], ["--version"], *asked], tmp_path):
        assert (code, err, heavy) == (0, "", []), words
        if words[-1] == "--version":
            assert out.startswith("gpt2xla 0."), words
        else:
            assert out.startswith("usage: " + " ".join(["gpt2xla", *words[:-1]])), words


def test_a_wrong_path_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    for words, code, out, err, heavy in answers([command.split() for command in WRONG_PATHS], tmp_path):
        assert (code, out, heavy) == (2, "", []), (words, err)
        (line,) = err.splitlines()
        assert "no such" in line.lower(), line
        culprits = {"train": "--train-dir ./fineweb_10BT/train", "train --train-dir a=0.5 b=0.5": "--train-dir a: "}
        assert culprits.get(" ".join(words), "no/such/place") in line
    assert not list(tmp_path.iterdir())
