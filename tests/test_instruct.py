"""docs/instruct.md from its first command to its last, at small size: on the torch runtime in this process, and in processes
of their own on both runtimes, which must agree."""

import contextlib
import csv
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, metrics, require_xla
from instruct_records import WORDS, alpaca, base_text, conversations, hellaswag_items, mmlu_rows, write_lines

from gpt2xla.checkpoint.run_folder import list_checkpoints
from gpt2xla.data.shards import Manifest
from gpt2xla.evals.mmlu import SUBJECTS

PAGE = (ROOT / "docs" / "instruct.md").read_text(encoding="utf-8")
BLOCKS = [
    text for how, text in re.findall(r"<!-- test: ([^>]*?) -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    if "tests/test_instruct.py" in how
]  # fmt: skip
# What the page fetches, and what takes its place here.
DATA = {
    "HuggingFaceFW/fineweb": "texts", "yahma/alpaca-cleaned": "instructions", "databricks/databricks-dolly-15k": "dialogues",
}  # fmt: skip
SIZES = {"--vocab-size": "480", "--seq-length": "192", "--max-documents": "400", "--save-interval": "8"}
MODEL = "--d-model 32 --num-layers 2 --num-heads 2 --vocab-size 480 --seq-length 192 --learning-rate 0.003"
# Appended to the programs' own; the last value of a flag wins.
SMALL = {
    "prepare_fineweb.py": "--dataset texts",
    "base": f"{MODEL} --train-batch-size 4 --gradient-accum-step 1 --eval-batch-size 8 --valid-interval 8",
    "tuned": "--learning-rate 0.003 --train-batch-size 8 --eval-batch-size 8",
    "perplexity_table.py": "--batch-size 8",
    "generate.py": "--max-new-tokens 24 --seed 1",
    "compare_models.py": "--batch-size 16 --mmlu-data mmlu --hellaswag-data hellaswag.jsonl",
}
SAID = f"Repeat the word. {WORDS[0]}\n/reset\nAdd 1 and 2.\n"
Run = Callable[[list[str], Path], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the repository's programs, and the data that take the place of the hub's."""
    for name in ("run_pretrain.py", "run_pretrain_xla.py", "generate.py", "scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_lines(tmp_path / "texts" / "part.jsonl", [{"text": text} for text in base_text(400)])
    write_lines(tmp_path / "instructions" / "part.jsonl", alpaca(80))
    write_lines(tmp_path / "dialogues" / "part.jsonl", conversations(60))
    write_lines(tmp_path / "hellaswag.jsonl", hellaswag_items(12))
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    for number, subject in enumerate(SUBJECTS):
        with (tmp_path / "mmlu" / "test" / f"{subject}_test.csv").open("w", newline="") as file:
            csv.writer(file).writerows(mmlu_rows(number))
    return tmp_path


def commands() -> list[list[str]]:
    """Those of the torch runtime. The page shows some of them for a TPU, too."""
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("python ")]


def in_small(words: list[str], folder: Path, best: str) -> list[str]:
    """A command of the page with other data, sizes and, where it names the base model, the one that the table found best."""
    program = Path(words[1]).name
    if "--config" in words and "sample-10BT" in words:
        at = words.index("--config")
        words = words[:at] + words[at + 2 :]
    if "--preset" in words:
        at = words.index("--preset")
        words = words[:at] + words[at + 2 :]
    words = [SIZES.get(flag, word) for flag, word in zip(["", *words], words, strict=False)]
    words = [best if re.fullmatch(r"base/step-\d+", word) else DATA.get(word, word) for word in words]
    words = [part for word in words for part in (expanded(word, folder) if "*" in word else [word])]
    if "run_pretrain" in program:
        program = "base" if "base" in words else "tuned"
    return [*words, *SMALL.get(program, "").split()]


def expanded(pattern: str, folder: Path) -> list[str]:
    found = sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
    assert found, pattern
    return found


def follow(folder: Path, run: Run) -> dict[str, str]:
    """Run all commands of the page, and return what each program printed last."""
    printed: dict[str, str] = {}
    for words in commands():
        best = re.search(r"^best: ([^,\s]+)", printed.get("perplexity_table.py", ""), re.MULTILINE)
        small = in_small(words, folder, best[1] if best else "")
        printed[Path(words[1]).name] = run(small, folder)
    return printed


def in_this_process(words: list[str], folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", words[1:])
        patch.setattr(sys, "stdin", io.StringIO(SAID))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(words[1], run_name="__main__")
    assert not end.value.code, f"{shlex.join(words)}\n{out.getvalue()}"
    return out.getvalue()


def on(runtime: str) -> Run:
    """Return what runs a command in a process of its own."""

    def run(words: list[str], folder: Path) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, *words[1:]]
        if runtime == "xla":
            environment["PJRT_DEVICE"] = "CPU"
            if words[1] == "run_pretrain.py":
                words[1] = "run_pretrain_xla.py"
            elif words[1] in ("generate.py", "scripts/perplexity_table.py", "scripts/compare_models.py"):
                words += ["--device", "xla"]
        result = subprocess.run(
            words, cwd=folder, env=environment, input=SAID, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}{result.stderr}"
        return result.stdout

    return run


def check(folder: Path, printed: dict[str, str]) -> None:
    """The claims of the page, on what the commands wrote and printed."""
    train, test = (Manifest.load(folder / "chat-data" / split) for split in ("train", "test"))
    assert train is not None
    assert test is not None
    assert train.row_length == test.row_length == 192
    assert train.documents + test.documents == 139, "all but the one that is too long"
    assert test.documents == 14, "a tenth"
    assert "longer than 192 tokens" in printed["prepare_chat.py"]
    assert "[[" in printed["inspect_data.py"]
    assert len(printed["perplexity_table.py"].split("base/step-")) > 3, "several checkpoints"
    for picture in ("base-losses.png", "compared.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    losses = [line["valid_loss"] for line in metrics(folder / "instruct") if "valid_loss" in line]
    assert min(losses) < losses[0]
    assert json.loads((folder / "instruct" / "best.json").read_text())["valid_loss"] == min(losses)
    newest = list_checkpoints(folder / "instruct")[-1]
    assert json.loads((newest / "tokenizer_config.json").read_text())["chat_template"]
    assert re.search(r"\| MMLU, 0-shot \|.*\d ±", printed["compare_models.py"])
    assert "| HellaSwag acc_norm |" in printed["compare_models.py"]


def test_the_commands_of_the_page_lead_from_text_to_a_model_that_answers(folder: Path) -> None:
    check(folder, follow(folder, in_this_process))


@pytest.mark.slow
def test_the_page_on_both_runtimes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    require_xla()
    other = tmp_path_factory.mktemp("other")
    for path in folder.iterdir():
        (other / path.name).symlink_to(path.resolve())
    for runtime, place in (("torch", folder), ("xla", other)):
        check(place, follow(place, on(runtime)))
    for run in ("base", "instruct"):
        one, two = ([m.get("loss", m.get("valid_loss")) for m in metrics(place / run)] for place in (folder, other))
        assert one == pytest.approx(two, rel=1e-5)
