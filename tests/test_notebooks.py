"""The notebooks, cell by cell in a kernel as their readers run them, on a CPU, a small model and text that is at hand; and
training in the kernel itself."""

import ast
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from conftest import ROOT, SMALL_RUN, metrics, require_xla, run, run_here, training_losses
from instruct_records import alpaca, write_lines
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.run_folder import list_checkpoints
from gpt2xla.data.tokenizer import load_tokenizer

NOTEBOOKS = ["kaggle_tpu.ipynb", "colab.ipynb"]
INSTRUCT, SKETCHES = "instruct.ipynb", "sketches.ipynb"
COMMANDS = dict.fromkeys(NOTEBOOKS, 12) | {INSTRUCT: 9, SKETCHES: 9}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def cells_tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Parameters with which the cells run here."""
    require_xla()
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [json.dumps({"text": f"Once upon a time there were {n} of them. " * 8}) for n in range(300)]
    (texts / "some.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return dict(
        DEVICE="CPU", FOLDER=str(tmp_path / "clone"), WORK=str(tmp_path), INPUT=str(tmp_path / "input"), DATASET=str(texts),
        TOKENS=10**8, TOKENIZER="bytes", VOCAB_SIZE=384, SEQ_LENGTH=32, D_MODEL=32, LAYERS=2, HEADS=2, BATCH=8, ACCUM=2,
        STEPS=8, WARMUP=2, LOOK_INTERVAL=4, SAVE_INTERVAL=4, PROMPT="Once upon",
    )  # fmt: skip


def namespace(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the notebook's first two code cells define: its parameters, and `run`."""
    for variable in ("PJRT_DEVICE", "PYTHONUNBUFFERED", "GIT_TERMINAL_PROMPT"):  # set by the cells, for the test alone
        monkeypatch.setenv(variable, "")
    values: dict[str, Any] = {}
    for cell in [cell for cell in read(name).cells if cell.cell_type == "code"][:2]:
        exec(cell.source, values)
    return values


def execute(name: str, values: dict[str, object], *without: str) -> nbformat.NotebookNode:
    """Run all cells, except those with one of the tags `without`, with other parameters. Raises CellExecutionError."""
    notebook = read(name)
    (parameters,) = cells_tagged(notebook, "parameters")
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    notebook.cells = [cell for cell in notebook.cells if not {*without} & {*cell.metadata.get("tags", [])}]
    try:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    except CellExecutionError as error:
        error.notebook = notebook
        raise
    return notebook


def printed(cells: list[nbformat.NotebookNode]) -> str:
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.mark.parametrize(
    ("name", "sessions"), [(NOTEBOOKS[0], 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in NOTEBOOKS)]
)
def test_every_cell_runs_and_the_run_resumes(
    name: str, sessions: int, small: dict[str, object], tmp_path: Path
) -> None:
    """Without the cell that installs, which did what `make install` does; the small model is left to the longer tests."""
    without = ["install"] if sessions > 1 else ["install", "smoke"]
    for steps in (8, 12)[:sessions]:  # the second time as a reader who resumes
        notebook = execute(name, small | {"STEPS": steps}, *without)
        text = printed(notebook.cells)
        assert "error:" not in text, text
        for smoke in cells_tagged(notebook, "smoke"):
            assert "no problems found" in printed([smoke])
            assert "step-00000010 after step 10" in printed([smoke]), "the small model was resumed"
        assert f"checkpoint: {tmp_path}/checkpoints/step-{steps:08d}" in text
        assert "\nOnce upon" in text, "the text that the model continues"
    assert not (tmp_path / "smoke").exists()
    lines = metrics(tmp_path / "checkpoints")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    assert {4, 8} <= {line["step"] for line in lines if "sample" in line} & {
        line["step"] for line in lines if "valid_loss" in line
    }
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")][-1] == f"step-{steps:08d}"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_gpt2_learns_to_answer(device: str, small: dict[str, object], tmp_path: Path) -> None:
    """On XLA, and on the torch runtime as on a GPU. The base model is GPT-2's kind without the tokens of the template."""
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
    ).save_pretrained(tmp_path / "base")
    load_tokenizer("bytes").save(tmp_path / "base")
    write_lines(tmp_path / "instructions" / "some.jsonl", alpaca(80))
    values = dict(BASE=str(tmp_path / "base"), DATASET=str(tmp_path / "instructions"), SEQ_LENGTH=128, EPOCHS=2)
    here = {name: small[name] for name in ("FOLDER", "WORK")}
    notebook = execute(INSTRUCT, values | here | {"DEVICE": device, "QUESTIONS": ["Add 1 and 2.", "Repeat"]}, "install")
    text = printed(notebook.cells)
    assert "error:" not in text, text
    assert "best checkpoint: " in text
    assert "[[" in printed(cells_tagged(notebook, "data"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat" / "best")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "chat" / "best")
    assert model.config.vocab_size > 257
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [257, 258]
    losses = [line["valid_loss"] for line in metrics(tmp_path / "chat") if "valid_loss" in line]
    assert min(losses) < losses[0]
    assert text.count('"prompt') >= 2, "both questions were answered"
    assert sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", [])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_gpt2_learns_to_draw(device: str, small: dict[str, object], tmp_path: Path) -> None:
    """On XLA, and on the torch runtime as on a GPU."""
    values = dict(
        INPUT=[str(ROOT / "tests" / "sketches" / "quickdraw" / f"{form}.ndjson") for form in ("raw", "simplified")],
        AUGMENT=7, TEST_FRACTION=0.2, D_MODEL=32, LAYERS=1, HEADS=2, STEPS=4, WARMUP=1, LOOK_INTERVAL=2, DEVICE=device,
    )  # fmt: skip
    notebook = execute(SKETCHES, values | {name: small[name] for name in ("FOLDER", "WORK")}, "install")
    text = printed(notebook.cells)
    assert "error:" not in text, text
    assert "[[" in printed(cells_tagged(notebook, "data"))
    measured = [line for line in metrics(tmp_path / "sketch-model") if "sketch_top1" in line]
    assert [line["step"] for line in measured] == [2, 4]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sketch-model" / "latest")
    assert {"<MSGSTART>", "<IMGSTART>", "<IMGEND>", "<MSGEND>"} <= {*tokenizer.all_special_tokens}
    assert len([line for line in text.splitlines() if re.search(r"[▀▄█]", line) and "%" not in line]) >= 12
    assert len(re.findall(r"^[a-zA-Z ]+ +\d+\.\d% ", text, re.MULTILINE)) == 5, "the five likeliest words"
    assert sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", [])) == 1


def test_a_download_that_fails_stops_the_notebook_at_its_cell_with_the_reason(small: dict[str, object]) -> None:
    with pytest.raises(
        CellExecutionError, match=r"exit code 2; .*--dataset owner/no-such-set: HF_HUB_OFFLINE"
    ) as failure:
        execute(NOTEBOOKS[0], small | {"DATASET": "owner/no-such-set"}, "install", "smoke")
    code = [cell for cell in failure.value.notebook.cells if cell.cell_type == "code"]
    failed = [cell for cell in code if any(output.output_type == "error" for output in cell.outputs)]
    assert failed == cells_tagged(failure.value.notebook, "data")
    assert not any(cell.outputs for cell in code[code.index(failed[0]) + 1 :])


@pytest.mark.parametrize("name", COMMANDS)
def test_installing_needs_a_repository_and_never_asks_for_a_password(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook, values = read(name), namespace(name, monkeypatch)
    (install,) = cells_tagged(notebook, "install")
    with pytest.raises(ValueError, match=r"^REPOSITORY, in the first code cell: write the address"):
        exec(install.source, values)
    values |= {"REPOSITORY": (tmp_path / "none").as_uri(), "FOLDER": str(tmp_path / "clone")}
    with pytest.raises(RuntimeError, match=r"^exit code 128; .*the repository exists"):
        exec(install.source, values)
    with pytest.raises(RuntimeError, match=r"^exit code 9; .*: the reason$"):
        values["run"]("read password; echo the reason; exit ${password:-9}")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_notebook_is_short_and_holds_no_output(name: str) -> None:
    notebook = read(name)
    assert 8 <= len(notebook.cells) <= 12
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_programs_know_every_flag_with_the_notebooks_own_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = namespace(name, monkeypatch) | {"EXTRA": "[xla-tpu]", "steps": 10, "hours_left": 8.0}
    source = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "code")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    commands = [eval(ast.unparse(c.args[0]), values) for c in calls if getattr(c.func, "id", "") == "run"]
    assert len(commands) == COMMANDS[name], commands
    for words in map(shlex.split, commands):
        if words[0] == "git":
            continue
        if words[0] == "pip":
            assert words[1] == "uninstall" or words[words.index("--editable") + 1] == ".[xla-tpu]"
            continue
        # A mistake after all others: with only this one left, everything before it was understood.
        check = (run if words[1] == "-m" else run_here)(words[1], *words[2:], "--no-such-flag")
        assert check.returncode == 2
        assert "--no-such-flag is unknown" in check.stderr, check.stderr


def test_the_kaggle_notebook_takes_data_and_checkpoints_of_the_last_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder as Kaggle adds it, which may be read only; of two versions, that with the later step."""
    values = namespace(NOTEBOOKS[0], monkeypatch)
    values |= {"INPUT": str(tmp_path / "input"), "WORK": str(tmp_path / "working"), "run": lambda command: None}
    (cell,) = cells_tagged(read(NOTEBOOKS[0]), "data")
    exec(cell.source, values)
    assert not (tmp_path / "working").exists(), "there is no last version"
    for version, step in (("a", 12), ("b", 4)):
        for kept in (
            f"checkpoints/step-{step:08d}/COMPLETE",
            "checkpoints/latest/COMPLETE",
            "data/train/manifest.json",
        ):
            file = tmp_path / "input" / "notebooks" / version / kept
            file.parent.mkdir(parents=True)
            file.write_text(version)
    for _ in range(2):
        exec(cell.source, values)
    assert [folder.name for folder in (tmp_path / "working/checkpoints").iterdir()] == ["step-00000012"]
    assert (tmp_path / "working/data/train/manifest.json").exists()


@pytest.mark.slow
def test_a_kernel_starts_its_workers_by_fork_again_and_again(
    trained: Path, data_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself takes no device. The second call resumes where the first one stopped."""
    require_xla()
    for name, value in {
        "PJRT_DEVICE": "CPU",
        "KAGGLE_KERNEL_RUN_TYPE": "Interactive",
        "CLOUD_TPU_TASK_ID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    flags = [*data_flags, *SMALL_RUN, "--mp-start-method", "fork", "--checkpoints-dir", str(tmp_path)]
    sources = [
        "import run_pretrain_xla",
        f"run_pretrain_xla.main({[*flags, '--train-steps', '10']!r})",
        f"run_pretrain_xla.main({flags!r})",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained), rel=1e-5)
