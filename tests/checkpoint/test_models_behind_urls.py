"""Models behind URLs: the same logits as from the folder itself; what is fetched, kept, fetched again, refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from conftest import ROOT, SMALL_RUN, run, run_here, succeed, training_losses
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file, save_file

from gpt2xla import storage as storage_module
from gpt2xla.checkpoint import remote_models
from gpt2xla.checkpoint.loading import build_model, load_weights, locate
from gpt2xla.checkpoint.remote_models import fetched
from gpt2xla.checkpoint.seal import COMPLETE, find_damage, seal
from gpt2xla.errors import InputError, RunFailed, as_named

TRAINING = ("training_state.pt", "training_state")


class Storage(LocalFileSystem):
    """Local files behind `storage://`, which record what is opened, and fail as asked. Lists come late for `unlisted`."""

    protocol = "storage"
    cachable = False
    opened: ClassVar[list[str]] = []
    unlisted: ClassVar[set[str]] = set()
    failures: ClassVar[dict[str, list[Exception]]] = {}

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        found = [info for info in super().ls(path, detail=True) if Path(info["name"]).name not in self.unlisted]
        return found if detail else [info["name"] for info in found]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        name = Path(path).name
        self.opened.append(name)
        if self.failures.get(name):
            raise self.failures[name].pop()
        return super()._open(path, mode, **kwargs)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fsspec.register_implementation("storage", Storage, clobber=True)
    monkeypatch.setattr(Storage, "opened", [])
    monkeypatch.setattr(Storage, "unlisted", set())
    monkeypatch.setattr(Storage, "failures", {})
    monkeypatch.setattr(storage_module, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def bucket(trained: Path, tmp_path: Path) -> Path:
    """What is behind storage://: run/ as it is sent there, hub/ with a Hugging Face model, and files/."""
    root = tmp_path / "bucket"
    shutil.copytree(trained, root / "run", ignore=shutil.ignore_patterns("latest", ".*"))
    (root / "run" / "latest").write_text("step-00000020")
    (root / "run" / "best.json").write_text('{"step": 10, "valid_loss": 3.5}\n')
    checkpoint = root / "run" / "step-00000010"
    for name in ("hub", "files"):
        (root / name).mkdir()
        shutil.copy(checkpoint / "config.json", root / name)
    shutil.copy(checkpoint / "model.safetensors", root / "hub")
    shutil.copy(checkpoint / "model.safetensors", root / "files" / "weights.safetensors")
    torch.save(load_file(checkpoint / "model.safetensors"), root / "files" / "weights.bin")
    (root / "hub" / "tf_model.h5").write_bytes(b"the same in another form")
    return root


def url(path: Path) -> str:
    return f"storage://{path}"


def logits(source: Path) -> torch.Tensor:
    config, weights = load_weights(source)
    with torch.no_grad():
        return build_model(config, weights, source).logits(torch.arange(16)[None])


def change(checkpoint: Path) -> None:
    """Other weights of the same size."""
    file = checkpoint if checkpoint.is_file() else checkpoint / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    if (checkpoint / COMPLETE).exists():
        (checkpoint / COMPLETE).unlink()
        seal(checkpoint, 20)


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("run", "run/step-00000020"),
        ("run/", "run/step-00000020"),
        ("run/latest", "run/step-00000020"),
        ("run@best", "run/step-00000010"),
        ("run/step-00000010", "run/step-00000010"),
        ("hub", "hub"),
        ("files/weights.safetensors", "files/weights.safetensors"),
        ("files/weights.bin", "files/weights.bin"),
    ],
)
def test_each_name_gives_the_logits_of_the_folder_itself(bucket: Path, home: Path, name: str, means: str) -> None:
    copy = locate(f"storage://{bucket}/{name}")
    assert home in copy.parents
    assert torch.equal(logits(copy), logits(bucket / means))
    assert as_named(f"{copy} and {copy.parent}") == f"{url(bucket / means)} and {url((bucket / means).parent)}"
    assert "tf_model.h5" not in Storage.opened


def test_only_what_resumes_brings_the_training_state(bucket: Path) -> None:
    address = url(bucket / "run")
    copy = locate(address)
    assert not set(Storage.opened) & {*TRAINING}
    assert find_damage(copy) is None, "its COMPLETE lists what is here"
    whole = bucket / "run" / "step-00000020"
    Storage.opened.clear()
    assert fetched(address, "--resume", with_training=True) == copy
    assert [name for name in Storage.opened if name not in (COMPLETE, "latest", "EVALUATED")] == ["training_state.pt"]
    assert (copy / COMPLETE).read_bytes() == (whole / COMPLETE).read_bytes()
    assert find_damage(copy) is None
    assert locate(address) == copy
    assert (copy / COMPLETE).read_bytes() == (whole / COMPLETE).read_bytes(), "it stays whole"
    (whole / "EVALUATED").write_text("{}")  # the evaluations that a stop had cut off are done now
    fetched(address, "--resume", with_training=True)
    assert (copy / "EVALUATED").read_text() == "{}"


@pytest.mark.parametrize("name", ["run", "hub", "files/weights.safetensors"])
def test_a_copy_is_kept_until_the_model_changes(bucket: Path, name: str) -> None:
    first = locate(url(bucket / name))
    Storage.opened.clear()
    assert locate(url(bucket / name)) == first
    assert not [opened for opened in Storage.opened if opened.endswith(".safetensors")]
    before = logits(first)
    source = bucket / "run" / "step-00000020" if name == "run" else bucket / name
    change(source)
    second = locate(url(bucket / name))
    assert torch.equal(logits(second), logits(source))
    assert torch.equal(logits(first), before), "a program may be reading the older one"
    assert not torch.equal(logits(second), before)


def test_a_copy_that_lost_a_file_is_completed(bucket: Path) -> None:
    copy = fetched(url(bucket / "run"), "--resume", with_training=True)
    (copy / "model.safetensors").unlink()
    assert locate(url(bucket / "run")) == copy
    assert find_damage(copy) is None


def test_the_newest_is_the_highest_that_is_whole(bucket: Path) -> None:
    run_url, steps = url(bucket / "run"), bucket / "run"
    (steps / "latest").write_text("step-00000010")
    assert locate(run_url).name == "step-00000020", "latest may be older than a list"
    Storage.unlisted.add("step-00000020")
    (steps / "latest").write_text("step-00000020")
    assert locate(run_url).name == "step-00000020", "and a list than latest"
    (steps / "step-00000020" / COMPLETE).unlink()
    assert locate(run_url).name == "step-00000010"
    (steps / "latest").unlink()
    assert locate(run_url).name == "step-00000010"


def test_a_checkpoint_deleted_meanwhile_gives_way_to_the_newer_one(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, aside = bucket / "run" / "step-00000020", bucket / "aside"
    newer.rename(aside)
    find = remote_models._find

    def find_before_pruning(*arguments: Any) -> Any:
        found = find(*arguments)
        if aside.exists():
            aside.rename(newer)
            shutil.rmtree(bucket / "run" / "step-00000010")
        return found

    monkeypatch.setattr(remote_models, "_find", find_before_pruning)
    assert locate(url(bucket / "run")).name == "step-00000020"


def test_a_model_that_changes_while_it_is_fetched_is_fetched_again(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, changes = remote_models.Bucket.fetch, [1]

    def fetch_during_an_upload(self: Any, files: Any) -> Any:
        found = fetch(self, files)
        if changes and changes.pop():
            change(bucket / "hub")
        return found

    monkeypatch.setattr(remote_models.Bucket, "fetch", fetch_during_an_upload)
    assert torch.equal(logits(locate(url(bucket / "hub"))), logits(bucket / "hub"))
    changes += [1, 1]
    change(bucket / "hub")
    with pytest.raises(RunFailed, match=r"--model storage://.*hub changed while it was fetched; try again"):
        locate(url(bucket / "hub"))


def remove_complete(run: Path) -> None:
    for file in run.rglob(COMPLETE):
        file.unlink()


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def only_metrics(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


REFUSALS: list[tuple[str, Callable[[Path], object], str]] = [
    ("nothing", lambda b: None, "{url}: nothing is there; check the address"),
    ("nothing@best", lambda b: None, r"there is no .*/nothing/best\.json: --keep-best was not set"),
    ("run", lambda b: remove_complete(b / "run"), "{url} holds no finished checkpoint yet; wait until"),
    ("run", lambda b: only_metrics(b / "run"), "{url} holds no finished checkpoint yet; wait until"),
    (
        "run/step-00000020",
        lambda b: remove_complete(b / "run"),
        "{url} is not a finished checkpoint: it has no COMPLETE",
    ),
    ("run@best", lambda b: remove_complete(b / "run"), r"{url}: best\.json names step-00000010, which is not there"),
    (
        "run@best",
        lambda b: (b / "run" / "best.json").write_text("{}"),
        r"/run/best\.json is damaged; name a checkpoint",
    ),
    ("run", lambda b: damage(b / "run" / "step-00000020" / COMPLETE), "{url}/step-00000020/COMPLETE is damaged; name"),
    (
        "run",
        lambda b: damage(b / "run" / "step-00000020" / "model.safetensors"),
        r"{url}/step-00000020/model\.safetensors is damaged: it is not what COMPLETE says",
    ),
    (
        "run",
        lambda b: (b / "run" / "step-00000020" / "model.safetensors").unlink(),
        r"{url}/step-00000020/model\.safetensors is missing although COMPLETE lists it",
    ),
    (
        "files",
        lambda b: (b / "files" / "config.json").unlink(),
        r"no config\.json; give the file itself, such as {url}/w",
    ),
    ("hub", lambda b: (b / "hub" / "config.json").rename(b / "hub" / "x"), r"no config\.json; give the file itself"),
    (".", lambda b: None, r"holds no model; name a run, a checkpoint, a Hugging Face folder or a model's file"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSALS)
def test_what_is_no_whole_model_is_refused_by_its_url(
    bucket: Path, home: Path, name: str, change: Callable[[Path], object], message: str
) -> None:
    change(bucket)
    address = url(bucket / name)
    with pytest.raises(InputError, match=message.replace("{url}", re.escape(address))) as error:
        locate(address)
    assert str(error.value).startswith("--model storage://")
    assert str(home) not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_few_failures_are_overcome_and_many_are_reported(bucket: Path) -> None:
    def dead() -> list[Exception]:
        return [ConnectionResetError("the line went dead") for _ in range(3)]

    Storage.failures = {COMPLETE: dead(), "model.safetensors": dead()}
    assert torch.equal(logits(locate(url(bucket / "run"))), logits(bucket / "run" / "step-00000020"))
    Storage.failures = {"model.safetensors": dead() + dead()}
    with pytest.raises(RunFailed, match=r"--model .*/model\.safetensors could not be read in 4 tries: .*went dead"):
        locate(url(bucket / "hub"))
    Storage.failures = {COMPLETE: dead() + dead()}
    with pytest.raises(InputError, match=r"/COMPLETE could not be read in 4 tries: .*; check address and credentials"):
        locate(url(bucket / "run"))
    Storage.failures = {COMPLETE: [PermissionError("Forbidden")]}
    with pytest.raises(InputError, match=r"COMPLETE could not be read: .*Forbidden; check address and credentials"):
        locate(url(bucket / "run"))


def test_a_full_disk_is_said(bucket: Path) -> None:
    Storage.failures = {"model.safetensors": [OSError(28, "No space left on device")]}
    with pytest.raises(RunFailed, match=r"--model storage://.*/run: the disk is full; free some space"):
        locate(url(bucket / "run"))


def test_long_fetches_are_announced(bucket: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    locate(url(bucket / "hub"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(remote_models, "_SAID_FROM", 1000)
    locate(url(bucket / "run"))
    locate(url(bucket / "run"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"fetching storage://.*/run/step-00000020: \d files, \d\.\d\d GB, to .*", lines[0])
    assert re.fullmatch(r"fetched in \d+ s \([\d,]+ MB/s\)", lines[1])


def test_copies_that_nobody_asks_for_are_deleted_when_another_is_fetched(bucket: Path, home: Path) -> None:
    def places() -> list[Path]:
        return sorted((home / ".cache" / "gpt2xla" / "models").iterdir())

    unused, used = (locate(url(bucket / name)) for name in ("run/step-00000010", "hub"))
    stream = (unused / "model.safetensors").open("rb")  # as a process that has mapped it
    theirs, elsewhere = unused.parent.with_name("theirs"), home / "elsewhere"
    theirs.mkdir()
    (theirs.parent / "link").symlink_to(elsewhere)
    shutil.copytree(unused.parent, elsewhere)
    for place in places():
        os.utime(place, times=(time.time() - 8 * 86400,) * 2)
    locate(url(bucket / "hub"))
    theirs_too = {theirs, theirs.parent / "link"}
    assert {unused.parent, used.parent} | theirs_too == set(places()), "nothing was fetched"
    newest = locate(url(bucket / "run"))
    assert {used.parent, newest.parent} | theirs_too == set(places())
    assert (elsewhere / unused.name / "model.safetensors").exists()
    with stream:
        assert stream.read() == (bucket / "run" / "step-00000010" / "model.safetensors").read_bytes()
    assert torch.equal(logits(locate(url(bucket / "run" / "step-00000010"))), logits(bucket / "run" / "step-00000010"))


LOGGING = """
import os, sys, time
from pathlib import Path
from gpt2xla import storage
from gpt2xla.checkpoint.remote_models import fetched
download = storage.download
def logged(files, source, target):
    with open(sys.argv[2], "a") as log:
        log.write(Path(source).name + "\\n")
    if len(sys.argv) > 3 and source.endswith(sys.argv[3]):
        target.write_bytes(b"half")
        print("began", flush=True)
        time.sleep(60)
    time.sleep(0.2)
    return download(files, source, target)
storage.download = logged
print(fetched(sys.argv[1], "--resume", with_training=True))
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOGGING, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_several_processes_fetch_once(bucket: Path, tmp_path: Path) -> None:
    processes = [start(f"file://{bucket}/run", tmp_path / "log") for _ in range(3)]
    answers = {process.communicate(timeout=100)[0] for process in processes}
    assert len(answers) == 1
    expected = sorted(file.name for file in (bucket / "run" / "step-00000020").rglob("*") if file.name != COMPLETE)
    assert sorted((tmp_path / "log").read_text().split()) == expected
    assert find_damage(Path(answers.pop().strip())) is None


def test_a_killed_process_leaves_no_model_and_no_lock(bucket: Path, home: Path, tmp_path: Path) -> None:
    process = start(f"file://{bucket}/run", tmp_path / "log", "training_state.pt")
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    process.kill()
    process.wait()
    assert list(home.rglob(".partial/training_state.pt")), "it was in the middle"
    assert not list(home.rglob(COMPLETE))
    assert not list(home.rglob("step-00000020/*"))
    copy = fetched(f"file://{bucket}/run", "--resume", with_training=True)
    assert find_damage(copy) is None
    assert not list(home.rglob(".partial"))


def test_programs_take_urls_and_name_them(bucket: Path, data: Path, tmp_path: Path) -> None:
    there = url(bucket / "run" / "step-00000010")
    output = tmp_path / "table"
    table = ["--valid-dir", data / "test", "--output", output, "--plot", f"{output}.png"]
    succeed(run_here("scripts/perplexity_table.py", "--models", there, bucket / "run" / "step-00000010", *table))
    first, second = output.with_suffix(".md").read_text().splitlines()[2:4]
    assert first.split("|")[3:] == second.split("|")[3:]
    assert first.split("|")[1].strip() == there
    converted = run_here("scripts/convert_checkpoint.py", "--model", there, "--output-dir", tmp_path / "converted")
    assert succeed(converted).startswith(f"{there}: 2 layers")
    damage(next((tmp_path / "home").rglob("config.json")))
    refused = run_here("scripts/convert_checkpoint.py", "--model", there, "--output-dir", tmp_path / "refused")
    assert refused.returncode == 2
    assert there in refused.stderr
    assert "home" not in refused.stderr
    missing = run_here("generate.py", "--model", f"{there}0", "--prompt", "a")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert f"--model {there}0: nothing is there; check the address" in missing.stderr


def test_a_run_starts_from_urls_as_from_folders(bucket: Path, data_flags: list[str], tmp_path: Path) -> None:
    found: dict[str, list[float]] = {}
    for name, address in (("here", str(bucket / "run" / "step-00000010")), ("there", f"file://{bucket}/run@best")):
        for flags in (
            ("--from-checkpoint", address),
            ("--resume", address),
            ("--from-checkpoint", address, "--resume", "never"),
        ):
            folder = tmp_path / f"{name}-{len(flags)}{flags[0]}"
            text = succeed(run_here("run_pretrain.py", *data_flags, *SMALL_RUN, *flags, "--checkpoints-dir", folder))
            found[folder.name] = training_losses(folder)
            assert ("resuming" in text) == (len(flags) == 2)
            if name == "there":
                assert f" file://{bucket}/run/step-00000010" in text
                assert "home" not in text
    for name in list(found):
        assert found[name] == found[name.replace("there", "here")]
    assert len(found["here-2--resume"]) == 10
    copy = fetched(f"file://{bucket}/run@best", "--resume", with_training=True)
    damage(copy / "training_state.pt")
    flags = [*SMALL_RUN, "--from-checkpoint", f"file://{bucket}/run@best", "--checkpoints-dir", tmp_path / "damaged"]
    refused = run_here("run_pretrain.py", *data_flags, *flags)
    fix = f"delete its copy, ~/.cache/gpt2xla/models/{copy.parent.name}, and start again"
    assert (refused.returncode, fix in refused.stderr) == (2, True)
    tested = run("run_pretrain.py", "--do-test", "--from-checkpoint", f"file://{bucket}/run", *data_flags[2:])
    assert succeed(tested).startswith(f"file://{bucket}/run/step-00000020: loss")
