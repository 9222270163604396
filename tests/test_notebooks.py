"""The notebooks, cell by cell in a kernel as their readers run them, on a CPU, a small model and text that is at hand; and
training in the kernel itself."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, SMALL_RUN, metrics, require_xla, run, run_here, training_losses
from nbclient import NotebookClient

from gpt2xla.checkpoint.run_folder import list_checkpoints

NOTEBOOKS = ["kaggle_tpu.ipynb", "colab.ipynb"]


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def cells_tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


@pytest.mark.parametrize(
    ("name", "sessions"), [(NOTEBOOKS[0], 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in NOTEBOOKS)]
)
def test_every_cell_runs_and_the_run_resumes(
    name: str, sessions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_xla()
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [json.dumps({"text": f"Once upon a time there were {n} of them. " * 8}) for n in range(300)]
    (texts / "some.jsonl").write_text("\n".join(lines))
    small = dict(
        DEVICE="CPU", WORK=str(tmp_path), DATASET=str(texts), TOKENS=10**8, TOKENIZER="bytes", VOCAB_SIZE=384,
        SEQ_LENGTH=32, D_MODEL=32, LAYERS=2, HEADS=2, BATCH=8, ACCUM=2, STEPS=8, WARMUP=2, SAVE_INTERVAL=4,
        PROMPT="Once upon",
    )  # fmt: skip
    notebook = read(name)
    (install,) = cells_tagged(notebook, "install")  # what `make install` did
    (parameters,) = cells_tagged(notebook, "parameters")
    notebook.cells.remove(install)
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for steps in (8, 12)[:sessions]:  # the second time as a reader who resumes
        notebook_of_session = nbformat.from_dict(notebook)
        cells_tagged(notebook_of_session, "parameters")[0].source += f"\nSTEPS = {steps}"
        NotebookClient(notebook_of_session, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
        printed = "".join(
            output.get("text", "") for cell in notebook_of_session.cells for output in cell.get("outputs", [])
        )
        assert "no problems found" in printed, printed
        assert "error" not in printed.lower(), printed
        assert f"checkpoint: {tmp_path}/checkpoints/step-{steps:08d}" in printed
        assert "\nOnce upon" in printed, "the text that the model continues"
    assert [line["step"] for line in metrics(tmp_path / "checkpoints") if "loss" in line] == list(range(1, steps + 1))
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")][-1] == f"step-{steps:08d}"
    outputs = [output for cell in notebook_of_session.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_short_and_holds_no_output(name: str) -> None:
    notebook = read(name)
    assert 8 <= len(notebook.cells) <= 12
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_programs_know_every_flag_with_the_notebooks_own_values(name: str) -> None:
    notebook = read(name)
    values: dict[str, object] = {}
    (parameters,) = cells_tagged(notebook, "parameters")
    exec(parameters.source, values)
    values |= {"DATA": "data", "CHECKPOINTS": "checkpoints", "EXTRA": "[xla-tpu]"}
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code").replace("\\\n", " ")
    programs = re.findall(r"(?:python|pip) .*", source)
    assert len(programs) == 8, programs
    for command in programs:
        words = shlex.split(command.format(**values))
        if words[0] == "pip":
            assert words[1] == "uninstall" or words[words.index("--editable") + 1] == ".[xla-tpu]"
            continue
        # A mistake after all others: with only this one left, everything before it was understood.
        check = (run if words[1] == "-m" else run_here)(words[1], *words[2:], "--no-such-flag")
        assert check.returncode == 2
        assert "--no-such-flag is unknown" in check.stderr, check.stderr


def test_the_kaggle_notebook_takes_an_earlier_sessions_checkpoints(tmp_path: Path) -> None:
    """The shell line before the training, with a folder as Kaggle adds it, which may be read only."""
    (line,) = re.findall(
        r"^!(\[ -z .*)$", "\n".join(cell.source for cell in read("kaggle_tpu.ipynb").cells), re.MULTILINE
    )
    earlier, work = tmp_path / "input" / "checkpoints", tmp_path / "working"
    (earlier / "step-00000004").mkdir(parents=True)
    (earlier / "step-00000004" / "COMPLETE").write_text("{}")
    work.mkdir()
    for _ in range(2):
        assert os.system(line.format(EARLIER=earlier, WORK=work)) == 0
    assert (work / "checkpoints" / "step-00000004" / "COMPLETE").exists()
    assert os.system(line.format(EARLIER="", WORK=work)) == 0


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
