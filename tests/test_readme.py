"""Every command of the README: run here at small sizes, or, where that needs more than a CPU, checked flag by flag.

The comment before each block says which: `test: run`, `test: check flags. REASON` or `test: this is what CI runs`.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, require_xla, run_here

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- test: ([^>]*?) -->\n)?```(bash|python)\n(.*?)```", README, re.DOTALL)

# Appended to the README's training commands; the last value of a flag wins.
SMALL = """--vocab-size 400 --seq-length 32 --d-model 32 --num-layers 2 --num-heads 2 --train-batch-size 4
--eval-batch-size 4 --gradient-accum-step 1 --warmup-steps 2 --valid-steps 2""".split()


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_block_says_how_it_is_tested() -> None:
    assert len(BLOCKS) >= 10
    for comment, how, _, block in BLOCKS:
        assert comment, f"say how this is tested:\n{block}"
        assert how == "run" or how == "this is what CI runs" or re.match(r"check flags\. Needs .+", how), how


def test_ci_runs_the_commands_of_the_readme() -> None:
    (block,) = [block for _, how, _, block in BLOCKS if how == "this is what CI runs"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(line in ci for line in block.split("\n") if line)


@pytest.mark.parametrize("block", [b for _, how, _, b in BLOCKS if how.startswith("check flags")])
def test_flags_exist(block: str) -> None:
    for words in commands(block):
        if words[:2] == ["pip", "install"]:
            assert all((ROOT / word.split("[")[0]).exists() for word in words[2:] if not word.startswith("-")), words
            continue
        if words[0] == "lm_eval":
            continue  # tests/evals/test_lm_eval.py runs it
        program = next(word for word in words if word.endswith(".py"))
        flags = words[words.index(program) + 1 :]
        # A mistake after all others: with only this one left, everything before it was understood.
        check = run_here(program, *flags, "--no-such-flag")
        assert check.returncode == 2
        assert "--no-such-flag is unknown" in check.stderr, check.stderr


def test_the_commands_run_one_after_another(tmp_path: Path) -> None:
    """A newcomer's path through the README, in a folder with the repository's programs and some text."""
    require_xla()
    for name in ("run_pretrain.py", "run_pretrain_xla.py", "generate.py", "scripts", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "prompts.txt").write_text("Once upon\nThere were\n")
    (tmp_path / "my-texts").mkdir()
    for number in range(40):
        text = "".join(f"Once upon a time there were {i} of {number}.\n" for i in range(60))
        (tmp_path / "my-texts" / f"{number}.txt").write_text(text)
    bin_folder = Path(sys.executable).parent
    ran = 0
    for _, how, language, block in BLOCKS:
        if how != "run":
            continue
        if language == "python":
            program = block.replace("step-00002000", "step-00000004")
            output = run([sys.executable, "-c", program], tmp_path)
            assert output.startswith("Once upon a time")
            ran += 1
            continue
        for words in commands(block):
            if words[:3] == ["python", "-m", "venv"] or words[0] == "pip":
                continue  # what `make install` did for this test
            environment = {}
            while "=" in words[0]:
                name, environment[name] = words.pop(0).split("=")
            if any("run_pretrain" in word for word in words):
                words += SMALL if "--do-test" not in words else ["--eval-batch-size", "4", "--valid-steps", "2"]
                words += ["--train-steps", "4", "--decay-steps", "4"] if "--do-test" not in words else []
            words = [
                "400" if previous == "--vocab-size" else word
                for previous, word in zip(["", *words], words, strict=False)
            ]
            run([str(bin_folder / words[0]), *words[1:]], tmp_path, environment)
            ran += 1
    assert ran == 16
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def run(words: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        words, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}{result.stderr}"
    return result.stdout
