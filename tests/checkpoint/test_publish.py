"""A run and a checkpoint are pushed to a hub on this machine; what arrives is loaded by transformers, and is the same."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, run_here, succeed
from data.hub_server import CLOSED, TOKEN, Hub
from transformers import GPT2LMHeadModel

from gpt2xla.checkpoint.run_folder import list_checkpoints
from gpt2xla.checkpoint.seal import find_damage, step_of
from gpt2xla.checkpoint.start import find_start
from gpt2xla.config import RunConfig
from gpt2xla.training import pretrain

NAME = "me/my-gpt2"
PUSH = ["scripts/push_to_hub.py", "--name", NAME, "--model"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub that this process asks, with the right token. Nothing waits before it tries again."""
    from huggingface_hub import constants

    with Hub(NAME, {}, kind="models") as hub:
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": hub.url}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        hub.shutdown()


def arrived(hub: Hub, folder: Path, branch: str = "main") -> Path:
    for name, content in hub.branches[branch].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return GPT2LMHeadModel.from_pretrained(folder).state_dict()


def is_equal(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(result: object, code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr  # type: ignore[attr-defined]
    (line,) = result.stderr.splitlines()[-1:]  # type: ignore[attr-defined]
    assert all(part in line for part in parts), line


def test_a_run_is_pushed_when_it_ends(hub: Hub, data_flags: list[str], tmp_path: Path) -> None:
    """It arrives whole, with card and picture, in a private repository. A second push uploads no weights again, and leaves
    the licence that its user has added on the hub."""
    flags = [*data_flags, *SMALL_RUN, "--no-compile", "--checkpoints-dir", tmp_path / "run", "--push-to-hub", NAME]
    output = succeed(run_here("run_pretrain.py", *flags))
    last = tmp_path / "run" / "step-00000020"
    assert f"pushed {last} to {hub.url}/{NAME}" in output
    assert hub.visibility == "private"
    assert is_equal(arrived(hub, tmp_path / "arrived"), last)
    assert not {"training_state.pt", "run_config.json", "COMPLETE"} & hub.files.keys()
    assert hub.files["loss.png"].startswith(b"\x89PNG")
    card = hub.files["README.md"].decode()
    for part in ("# my-gpt2\n", f'from_pretrained("{NAME}")', "cosine", "adamw", "3,840 (12 sequences", "](loss.png)"):
        assert part in card, card
    assert "CPU" in card
    assert "No license is stated" in card
    assert "step-00000020" not in card
    assert str(tmp_path) not in card
    assert "Continue training" not in card

    hub.files["README.md"] = card.replace("tags:", "license: apache-2.0\ntags:").encode()
    sent = len([r for r in hub.requests if r.method == "PUT"])
    again = succeed(run_here("run_pretrain.py", *flags))
    assert "nothing to do" in again
    assert "pushed" in again
    assert len([r for r in hub.requests if r.method == "PUT"]) == sent == 1
    assert "license: apache-2.0" in hub.files["README.md"].decode()


def test_the_best_checkpoint_is_pushed_to_a_branch(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    first, *_, last = list_checkpoints(run)
    (run / "best.json").write_text(json.dumps({"step": step_of(first), "valid_loss": 3.0}))
    pretrain._push(run, NAME)
    assert is_equal(arrived(hub, tmp_path / "arrived"), last)
    assert is_equal(arrived(hub, tmp_path / "best", "best"), first)


def test_a_checkpoint_with_its_training_state_can_be_resumed_elsewhere(hub: Hub, trained: Path, tmp_path: Path) -> None:
    source = trained / "step-00000010"
    succeed(run_here(*PUSH, source, "--branch", "halfway", "--training-state"))
    copy = arrived(hub, tmp_path / "step-00000010", "halfway")
    assert find_damage(copy) is None
    assert find_start(RunConfig.from_flat({"resume": str(copy), "checkpoints_dir": str(tmp_path / "new")})).step == 10
    assert is_equal(copy, source)
    assert hub.files == {}
    assert f'"{NAME}", revision="halfway"' in hub.branches["halfway"]["README.md"].decode()


def test_without_matplotlib_or_log_the_card_says_so(
    hub: Hub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = shutil.copytree(trained / "step-00000020", tmp_path / "alone")
    succeed(run_here(*PUSH, alone))
    assert "There is no picture: the log" in hub.files["README.md"].decode()
    monkeypatch.setitem(sys.modules, "gpt2xla.logs.loss_picture", None)
    succeed(run_here(*PUSH, trained))
    assert "There is no picture: matplotlib" in hub.files["README.md"].decode()
    assert "loss.png" not in hub.files


@pytest.mark.parametrize(
    ("name", "token", "parts"),
    [
        ("me//x", TOKEN, ["me//x", "write owner/name"]),
        (NAME, "", ["not logged in", "hf auth login"]),
        (NAME, "hf_wrong", ["does not know this login", "HF_TOKEN"]),
        ("them/x", TOKEN, ["them/x", "may not write there"]),
    ],
)
def test_a_name_or_login_that_cannot_push_is_refused_before_training(
    name: str,
    token: str,
    parts: list[str],
    hub: Hub,
    data_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    flags = [*data_flags, *SMALL_RUN, "--no-compile", "--checkpoints-dir", tmp_path / "run", "--push-to-hub", name]
    refused(run_here("run_pretrain.py", *flags), 2, "--push-to-hub", *parts)
    assert not (tmp_path / "run").exists()


def test_no_write_access_and_no_network_are_refused(hub: Hub, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.misbehave("POST", "/preupload/main", itertools.repeat(403))
    refused(run_here(*PUSH, trained), 2, NAME, "may not write there")
    hub.misbehave("POST", "/preupload/main", itertools.repeat(CLOSED))
    refused(run_here(*PUSH, trained), 2, NAME, "cannot be reached")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run_here(*PUSH, trained), 2, NAME, "HF_HUB_OFFLINE")


@pytest.mark.parametrize("path", ["/commit/main", "/preupload/main"])
def test_a_failed_upload_leaves_the_run_whole_and_says_how_to_push_later(
    path: str, hub: Hub, data_flags: list[str], tmp_path: Path
) -> None:
    """Exit code 1: what was asked was not done. Then the command that the message names does it."""
    faults = {"/commit/main": itertools.repeat(500), "/preupload/main": itertools.chain([None], itertools.repeat(403))}
    hub.misbehave("POST", path, faults[path])  # or the login was good only when the run began
    flags = [*data_flags, *SMALL_RUN, "--no-compile", "--train-steps", "4", "--checkpoints-dir", tmp_path / "run"]
    result = run_here("run_pretrain.py", *flags, "--decay-steps", "4", "--push-to-hub", NAME)
    last = tmp_path / "run" / "step-00000004"
    hub.behave()
    command = f"scripts/push_to_hub.py --model {last} --name {NAME}"
    refused(result, 1, "was not pushed", f"python {command}")
    assert find_damage(last) is None
    assert json.loads((last / "run_config.json").read_text())["push_to_hub"] == NAME
    succeed(run_here(*command.split()))
    assert is_equal(arrived(hub, tmp_path / "arrived"), last)
