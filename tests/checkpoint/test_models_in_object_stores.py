"""Models in real object stores on this machine: S3 by s3fs, GCS by gcsfs, as programs reach them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, succeed
from object_server import ObjectServer, object_server
from test_models_behind_urls import change, logits

from gpt2xla import storage
from gpt2xla.checkpoint.loading import locate
from gpt2xla.checkpoint.remote_models import fetched
from gpt2xla.checkpoint.seal import COMPLETE, find_damage
from gpt2xla.errors import InputError
from gpt2xla.storage import Bucket


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[ObjectServer]:
    with object_server(request.param) as running, running.reached_from_here():
        yield running


@pytest.fixture
def local(server: ObjectServer, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of which run/ and hub/ in the bucket are copies."""
    monkeypatch.setattr(storage, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "local"
    shutil.copytree(trained, folder / "run", ignore=shutil.ignore_patterns("latest", ".*"))
    (folder / "run" / "latest").write_text("step-00000020")
    (folder / "run" / "best.json").write_text('{"step": 10, "valid_loss": 3.5}\n')
    (folder / "hub").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained / "step-00000010" / name, folder / "hub")
    send(server, folder)
    yield folder
    server.clear()


def send(server: ObjectServer, folder: Path) -> None:
    for name in ("run", "hub"):
        found = {file.relative_to(folder / name).as_posix(): file for file in (folder / name).rglob("*")}
        Bucket(server.at(name), "--model").send({name: file for name, file in found.items() if file.is_file()})


def test_each_name_gives_the_logits_of_the_folder_itself(server: ObjectServer, local: Path) -> None:
    names = {
        "run": "run/step-00000020", "run@best": "run/step-00000010", "run/step-00000010": "run/step-00000010",
        "run/latest": "run/step-00000020", "hub": "hub", "hub/model.safetensors": "hub/model.safetensors",
    }  # fmt: skip
    for name, means in names.items():
        copy = locate(server.at(name))
        assert torch.equal(logits(copy), logits(local / means)), name
        assert locate(server.at(name)) == copy
    copy = fetched(server.at("run"), "--resume", with_training=True)
    assert find_damage(copy) is None
    assert (copy / COMPLETE).read_bytes() == (local / "run" / "step-00000020" / COMPLETE).read_bytes()


def test_what_is_not_there_is_said(server: ObjectServer, local: Path) -> None:
    for name in (server.at("nothing"), f"{server.kind}://no-such-bucket/run"):
        with pytest.raises(InputError, match=f"^--model {name}: nothing is there; check the address$"):
            locate(name)


def test_a_changed_model_is_fetched_again(server: ObjectServer, local: Path) -> None:
    names = ("run", "hub", "hub/model.safetensors")
    before = [locate(server.at(name)) for name in names]
    change(local / "run" / "step-00000020")
    change(local / "hub")
    send(server, local)
    for name, copy in zip(names, before, strict=True):
        means = local / "run" / "step-00000020" if name == "run" else local / name
        assert torch.equal(logits(locate(server.at(name))), logits(means))
        assert not torch.equal(logits(copy), logits(means))


def test_a_network_that_fails_at_times_is_overcome(server: ObjectServer, local: Path) -> None:
    server.cut(times=2, method="GET", key="*/model.safetensors")
    server.fail(503, times=2, method="GET", key="*/COMPLETE")
    assert torch.equal(logits(locate(server.at("run"))), logits(local / "run" / "step-00000020"))


def test_a_process_killed_in_the_middle_leaves_no_model(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys; print(os.getpid(), flush=True); input(); from gpt2xla.checkpoint.remote_models import fetched"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}; fetched({server.at('run')!r}, '--resume', with_training=True)"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | server.environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    server.kill(int(process.stdout.readline()), method="GET", key="*/training_state.pt")
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=100) == -9
    assert list((tmp_path / "home").rglob(".partial"))
    assert not list((tmp_path / "home").rglob(COMPLETE))
    assert find_damage(fetched(server.at("run"), "--resume", with_training=True)) is None


@pytest.mark.slow
def test_a_program_names_urls_and_says_what_is_wrong_there(server: ObjectServer, local: Path, tmp_path: Path) -> None:
    def convert(name: str) -> subprocess.CompletedProcess[str]:
        flags = ["--model", name, "--output-dir", tmp_path / "converted"]
        return run("scripts/convert_checkpoint.py", *flags, **server.environment)

    there = server.at("run/step-00000010")
    assert succeed(convert(server.at("run@best"))).startswith(f"{there}: 2 layers")
    shutil.rmtree(tmp_path / "converted")
    newest = server.at("run/step-00000020")
    Bucket(newest, "--model").remove(["model.safetensors"])
    server.expire_credentials()
    try:
        refused = convert(server.at("run"))
    finally:
        server.renew_credentials()
    missing = convert(server.at("run"))
    for result, message in (
        (refused, f"--model {server.at('run')}.*; check address and credentials"),
        (missing, f"--model {newest}/model.safetensors is missing although COMPLETE lists it"),
    ):
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert re.search(message, result.stderr)
        assert " tries" not in result.stderr
