"""A run for the cases to copy, and how a program must refuse what they make of it."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, prepare_documents, run

from faults.hostile.scene import Scene
from gpt2xla.processes.exits import exit_code

Call = Callable[[list[str]], int]
Refused = Callable[[list[str], str], None]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared documents and a run of 20 steps on them."""
    folder = tmp_path_factory.mktemp("whole")
    prepare_documents(folder / "data")
    flags = [*SMALL_RUN, "--vocab-size", 257, "--train-dir", folder / "data" / "train"]
    flags += ["--valid-dir", folder / "data" / "test", "--checkpoints-dir", folder / "run"]
    result = run("run_pretrain.py", *flags)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def scene(whole: Path, tmp_path: Path) -> Scene:
    shutil.copytree(whole / "data", tmp_path / "data")
    checkpoint = shutil.copytree(whole / "run" / "step-00000020", tmp_path / "checkpoint")
    return Scene(tmp_path, checkpoint, tmp_path / "data" / "train", tmp_path / "data" / "test", tmp_path / "sentinel")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Runs a command in this process. Returns its exit code; 1 for an error that it would print with its traceback."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))

    def call(argv: list[str]) -> int:
        main = importlib.import_module(argv[0].removesuffix(".py").replace("/", ".")).main
        monkeypatch.setattr(sys, "argv", argv)
        try:
            return exit_code(main)
        except Exception:
            traceback.print_exc()
            return 1

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def refused(scene: Scene, call: Call, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Checks that a command ends in one line that names `culprit`, runs nothing and writes nothing."""

    def check(argv: list[str], culprit: str) -> None:
        code = call(argv)
        error = capsys.readouterr().err
        assert not scene.sentinel.exists(), "it ran"
        assert "Traceback" not in error, error
        assert code == 2, error
        lines = error.splitlines()
        assert len(lines) == 1, error
        assert re.match(r"[\w/]+\.py: error: ", lines[0])
        assert culprit in lines[0]
        assert len(lines[0]) < 1500
        assert not (scene.folder / "out").exists(), "nothing is written"

    return check
