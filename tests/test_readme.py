"""Every command of the README and of docs/: run at small sizes, or, where that needs more than a CPU, checked flag by flag.

The comment before each block says which: `test: run`, `test: check flags. REASON` or `test: this is what CI runs`.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, require_xla, run_here

# In the order in which their blocks run: they build on my-data and checkpoints, which the README's make. Then how many
# blocks run, and of how many the flags are checked.
PAGES = {
    "README.md": (3, 0),
    "docs/index.md": (0, 1),
    "docs/data.md": (1, 5),
    "docs/data-formats.md": (0, 3),
    "docs/tpu.md": (3, 2),
    "docs/will-it-fit.md": (0, 4),
    "docs/gpu-and-cpu.md": (1, 3),
    "docs/parallelism.md": (0, 7),
    "docs/cloud.md": (0, 2),
    "docs/optimizers.md": (0, 3),
    "docs/schedules.md": (0, 4),
    "docs/options.md": (0, 2),
    "docs/resuming.md": (0, 5),
    "docs/run-folder.md": (1, 4),
    "docs/generation.md": (4, 2),
    "docs/playground.md": (0, 1),
    "docs/evaluation.md": (1, 5),
    "docs/instruct.md": (0, 9),
    "docs/sketches.md": (0, 3),
    "docs/checkpoints.md": (0, 6),
    "docs/architecture.md": (0, 1),
    "docs/glossary.md": (0, 1),
    "docs/testing.md": (0, 1),
    "docs/reliability.md": (0, 1),
}
# Programs of others. tests/evals/test_lm_eval.py runs the first; the pages say how the others were tried.
OTHERS = ("lm_eval", "tensorboard", "llama-cli", "vllm")
LONGEST = {"README.md": 180}  # lines
LONGEST_PAGE = 200

# Appended to training commands; the last value of a flag wins. Steps are small, and a longer run stays longer.
SMALL = """--vocab-size 400 --seq-length 32 --d-model 32 --num-layers 1 --num-heads 2 --train-batch-size 4
--eval-batch-size 4 --gradient-accum-step 1 --valid-steps 2""".split()
STEPS = {"600": "2", "2000": "4", "3000": "6"}


class Block(NamedTuple):
    page: str
    how: str
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True) for line in lines if line.strip()]


TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    Block(page, *found)
    for page, text in TEXTS.items()
    for found in re.findall(r"(?:<!-- test: ([^>]*?) -->\n)?```(bash|python)\n(.*?)```", text, re.DOTALL)
]
# A cell that is a command and nothing else.
CELLS = [
    Block(page, "check flags", "bash", cell)
    for page, text in TEXTS.items()
    for cell in re.findall(r"\| `((?:\w+=\S+ )*(?:python|torchrun) [^`]+)` \|", text)
]


def test_every_page_is_in_the_table_and_says_how_its_blocks_are_tested() -> None:
    assert set(PAGES) == {"README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))}
    for block in BLOCKS:
        assert re.fullmatch(r"run|this is what CI runs|check flags\. Needs .+", block.how), block
    counts = Counter((block.page, block.how.split(".")[0]) for block in BLOCKS)
    assert {page: (counts[page, "run"], counts[page, "check flags"]) for page in PAGES} == PAGES
    assert len(CELLS) >= 4


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_and_open_with_a_command(page: str) -> None:
    lines = TEXTS[page].splitlines()
    assert len(lines) <= LONGEST.get(page, LONGEST_PAGE)
    if page == "README.md":
        assert max(map(len, lines)) <= 120
        return
    opening = TEXTS[page].split("```")[0].split("\n", 1)[1]
    assert "\n#" not in opening
    assert len(re.findall(r"[.:?!](?:\s|$)", re.sub(r"<!--.*?-->", "", opening))) <= 2


def test_ci_runs_the_commands_of_the_pages() -> None:
    pages = {block.page: block.text.splitlines() for block in BLOCKS if block.how == "this is what CI runs"}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in ci if line.startswith("make")] == pages["docs/testing.md"]
    assert all(any(line.startswith(command) for line in ci) for command in pages["README.md"])


def anchors(page: Path) -> set[str]:
    """Anchors of the headings that get the same one on GitHub and on the site: those without other signs than , ? ' and ."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = [title for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE) if re.fullmatch(r"[\w ,?'.-]+", title)]
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        assert not re.match(r"\w+:", link), f"{link}: the repository has no address to link to"
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"\b(?:gpt2xla|tests|scripts|benchmarks|notebooks)/[\w./]+\.\w+\b", TEXTS[page]):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("block", [b for b in [*BLOCKS, *CELLS] if b.how.startswith("check flags")])
def test_flags_exist(block: Block) -> None:
    for words in block.commands():
        while "=" in words[0]:
            words.pop(0)
        if words[:2] == ["pip", "install"]:
            assert all((ROOT / word.split("[")[0]).exists() for word in words[2:] if not word.startswith("-")), words
            continue
        if words[0] == "make":
            assert re.search(rf"^\.PHONY:.*\b{words[1]}\b", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            continue
        if "gpt2xla" in words:
            words = ["gpt2xla/__main__.py", *words[words.index("gpt2xla") + 1 :]]
        if words[:2] == ["python", "-m"]:
            assert all(importlib.util.find_spec(word) for word in words[2:]), words
            continue
        if words[0] == "cloud/spot_tpu.sh":  # its arguments are those of the program that it starts
            words = ["run_pretrain_xla.py", *words[1:]]
        if words[0] in OTHERS or "convert_hf_to_gguf.py" in words:
            continue
        program = next(word for word in words if word.endswith(".py"))
        flags = [word for word in words[words.index(program) + 1 :] if word != "--help"]
        # A mistake after all others: with only this one left, everything before it was understood.
        check = run_here(program, *flags, "--no-such-flag")
        assert check.returncode == 2
        assert re.search("--no-such-flag is unknown|unrecognized arguments: --no-such-flag\n", check.stderr), (
            check.stderr
        )


def test_the_commands_run_one_after_another(tmp_path: Path) -> None:
    """A newcomer's path through the README and the pages, in a folder with the repository's programs and some text.

    A command that several pages show runs once."""
    require_xla()
    for name in ("run_pretrain.py", "run_pretrain_xla.py", "generate.py", "scripts", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "prompts.txt").write_text("Once upon\nThere were\n")
    (tmp_path / "my-texts").mkdir()
    for number in range(40):
        text = "".join(f"Once upon a time there were {i} of {number}.\n" for i in range(60))
        (tmp_path / "my-texts" / f"{number}.txt").write_text(text)
    done: list[list[str]] = []
    for block in BLOCKS:
        if block.how != "run":
            continue
        if block.language == "python":
            program = re.sub(r"step-0000(\d{4})", lambda step: f"step-{int(STEPS[step[1]]):08}", block.text)
            assert run(["python", "-c", program], tmp_path).startswith("Once upon a time")
            continue
        for words in block.commands():
            if words in done or words[:3] == ["python", "-m", "venv"] or words[0] == "pip":
                continue  # `make install` did the last two for this test
            done.append(list(words))
            run(in_small(words), tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def in_small(words: list[str]) -> list[str]:
    is_training = any("run_pretrain" in word for word in words)
    if is_training and "--do-test" in words:
        words = [*words, "--eval-batch-size", "4"]
    elif is_training:
        steps = STEPS.get(words[words.index("--train-steps") + 1] if "--train-steps" in words else "", "4")
        words = [*words, *SMALL, "--train-steps", steps, "--decay-steps", "4"]
    return ["400" if flag == "--vocab-size" else word for flag, word in zip(["", *words], words, strict=False)]


def run(words: list[str], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while "=" in words[0]:
        name, environment[name] = words.pop(0).split("=")
    result = subprocess.run(
        [str(Path(sys.executable).parent / words[0]), *words[1:]], cwd=folder, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}{result.stderr}"
    return result.stdout
