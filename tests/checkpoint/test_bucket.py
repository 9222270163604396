"""Runs whose --checkpoints-dir is a URL: what is sent, what another machine finds, and who may write."""

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_RUN, metrics, run_here, succeed, torchrun, training_losses
from safetensors.torch import load_file

from gpt2xla import storage
from gpt2xla.checkpoint import saver
from gpt2xla.checkpoint.bucket import mirror
from gpt2xla.checkpoint.bucket.layout import layout_of
from gpt2xla.checkpoint.seal import COMPLETE, find_damage
from gpt2xla.errors import InputError
from gpt2xla.processes import lease
from gpt2xla.storage import Bucket

RUN = [*SMALL_RUN, "--save-interval", "5"]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    succeed(run_here("run_pretrain.py", *data_flags, *RUN, "--checkpoints-dir", folder))
    return folder


class Place:
    """A bucket, and machines that have nothing else in common."""

    def __init__(self, folder: Path, data_flags: list[str]) -> None:
        self.folder, self.run, self.data_flags = folder, folder / "bucket" / "run", data_flags
        self.url = f"file://{self.run}"

    def train(self, machine: str, *flags: object, code: int = 0) -> str:
        result = run_here("run_pretrain.py", *self.data_flags, *RUN, *self.where(machine), *flags)
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    def where(self, machine: str) -> list[str]:
        return ["--checkpoints-dir", self.url, "--scratch-dir", str(self.folder / machine)]

    def here(self, machine: str) -> Path:
        (folder,) = (self.folder / machine).iterdir()
        return folder


@pytest.fixture
def place(tmp_path: Path, data_flags: list[str]) -> Place:
    return Place(tmp_path, data_flags)


def assert_as(run: Path, unbroken: Path) -> None:
    assert training_losses(run) == training_losses(unbroken)
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(unbroken)]
    ours, theirs = (load_file(folder / "step-00000020" / "model.safetensors") for folder in (run, unbroken))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_what_is_sent(place: Place, unbroken: Path) -> None:
    text = place.train("a", "--saved-checkpoint-limit", 2, "--keep-best")
    assert_as(place.run, unbroken)
    whole = sorted(file.parent.name for file in place.run.glob("step-*/COMPLETE"))
    assert whole[-1] == (place.run / "latest").read_text() == "step-00000020"
    assert json.loads((place.run / "best.json").read_text())["step"] in (10, 20)
    assert all(find_damage(place.run / name) is None for name in whole)
    assert f"checkpoint: {place.url}/step-00000020" in text
    sizes = [json.loads(line)["bytes"] for line in (place.run / "uploads.jsonl").read_text().splitlines()]
    files = [file for file in (place.run / whole[-1]).iterdir() if file.name != COMPLETE]
    assert sizes[-1] == sum(file.stat().st_size for file in files)
    assert json.loads((place.run / "lease" / "00000001.json").read_text())["is_released"] is True


def test_another_machine_continues(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 10)
    place.train("b")
    assert_as(place.run, unbroken)
    shutil.rmtree(place.folder / "b")
    assert "nothing to do" in place.train("c")


def test_another_machine_has_a_scratch_folder_of_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train("a", "--train-steps", 10)
    before = sorted(place.here("a").iterdir())
    home = place.folder / "home"
    monkeypatch.setenv("HOME", str(home))
    succeed(run_here("run_pretrain.py", *place.data_flags, *RUN, "--checkpoints-dir", place.url))
    assert sorted(place.here("a").iterdir()) == before
    (folder,) = (home / ".cache/gpt2xla/runs").iterdir()
    assert (folder / "latest").resolve().name == "step-00000020"


def test_a_bucket_that_was_copied_continues_as_a_folder(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 10)
    succeed(run_here("run_pretrain.py", *place.data_flags, *RUN, "--checkpoints-dir", place.run))
    assert_as(place.run, unbroken)
    assert (place.run / "latest").resolve() == place.run / "step-00000020"


def test_a_machine_that_was_left_behind_takes_what_the_bucket_has(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 5)
    place.train("b", "--train-steps", 15, "--learning-rate", "0.02")
    # As if it had made steps that it never sent:
    ahead = place.here("a") / "step-00000010"
    shutil.copytree(place.here("a") / "step-00000005", ahead)
    text = place.train("a")
    assert "which counts, does not hold it" in text
    assert training_losses(place.run)[5:15] != training_losses(unbroken)[5:15]
    assert not ahead.exists()


def test_the_same_machine_sends_what_a_killed_run_had_not(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 10)
    for name in ("step-00000010", "latest"):  # as if killed before it was sent
        target = place.run / name
        shutil.rmtree(target) if target.is_dir() else target.write_text("step-00000005")
    text = place.train("a")
    assert "resuming" in text
    assert "after step 10" in text
    assert_as(place.run, unbroken)


def test_a_list_that_does_not_show_the_run_yet(place: Place, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train("a", "--train-steps", 10)
    monkeypatch.setattr(Bucket, "files", lambda self, folder="": {})
    place.train("b")
    assert_as(place.run, unbroken)


def test_what_is_damaged_here_comes_from_the_bucket(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 10)
    (place.here("a") / "step-00000010" / "config.json").unlink()
    text = place.train("a")
    assert "after step 10" in text
    assert "ABANDONED" not in text
    assert_as(place.run, unbroken)


def test_a_bucket_that_was_emptied_begins_a_new_run(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 10, "--learning-rate", "0.02")
    shutil.rmtree(place.run)
    text = place.train("a")
    assert "set aside" in text
    assert_as(place.run, unbroken)


def test_a_slash_at_the_end_names_the_same_run(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 10)
    assert "after step 10" in place.train("a", "--checkpoints-dir", f"{place.url}/")
    assert len(list((place.folder / "a").iterdir())) == 1
    assert_as(place.run, unbroken)


def test_a_finished_run_sends_its_last_checkpoint(place: Place) -> None:
    place.train("a")
    shutil.rmtree(place.run / "step-00000020")
    assert "nothing to do" in place.train("a")
    assert find_damage(place.run / "step-00000020") is None


@pytest.mark.parametrize("damage", ["file", "complete", "missing"])
def test_a_damaged_checkpoint_is_named_and_passed_over(place: Place, unbroken: Path, damage: str) -> None:
    place.train("a", "--train-steps", 10)
    newest = place.run / "step-00000010"
    if damage == "file":
        content = bytearray((newest / "training_state.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "training_state.pt").write_bytes(content)
    elif damage == "complete":
        (newest / COMPLETE).write_text("{}")
    else:
        (newest / "config.json").unlink()
    text = place.train("b")
    assert f"skipped a checkpoint: {place.url}/step-00000010" in text
    assert "after step 5" in text
    assert_as(place.run, unbroken)


def test_no_checkpoint_is_whole(place: Place) -> None:
    place.train("a", "--train-steps", 5)
    (place.run / "step-00000005" / "config.json").unlink()
    text = place.train("b", code=2)
    assert f"no checkpoint in {place.url} is whole" in text


def test_a_prefix_without_complete_is_no_checkpoint(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 10)
    (place.run / "step-00000010" / COMPLETE).unlink()
    assert "after step 5" in place.train("b")
    assert_as(place.run, unbroken)


def test_going_back_sets_later_checkpoints_aside(place: Place, unbroken: Path) -> None:
    place.train("a", "--train-steps", 5)
    place.train("a", "--train-steps", 15, "--learning-rate", "0.02")
    text = place.train("b", "--resume", f"{place.url}/step-00000005", "--learning-rate", "0.01")
    assert "step-00000015 has ABANDONED instead of COMPLETE now" in text
    assert training_losses(place.run) == training_losses(unbroken)
    assert (place.run / "step-00000015" / COMPLETE).exists()  # made again
    assert not (place.run / "step-00000015" / "ABANDONED").exists()


def test_a_run_is_named_by_its_own_url(place: Place) -> None:
    place.train("a", "--train-steps", 10)
    assert "after step 10" in place.train("b", "--resume", f"{place.url}/latest", "--train-steps", 15)
    assert "after step 15" in place.train("c", "--resume", f"{place.url}/")
    text = place.train("d", "--from-checkpoint", f"{place.url}/step-00000010", code=2)
    assert f"is older than step-00000020 beside it; to go back to it, use --resume {place.url}/step-00000010" in text


def test_resume_never_is_refused_where_a_run_is(place: Place) -> None:
    place.train("a", "--train-steps", 5)
    text = place.train("b", "--resume", "never", code=2)
    assert "already holds step-00000005 of another run" in text


def test_the_best_of_another_machine_stays(place: Place) -> None:
    flags = ("--keep-best", "--saved-checkpoint-limit", 1, "--valid-interval", 5)
    place.train("a", "--train-steps", 15, *flags)
    best = json.loads((place.run / "best.json").read_text())
    best_step = place.run / f"step-{best['step']:08d}"
    assert find_damage(best_step) is None
    place.train("b", *flags)
    assert json.loads((place.run / "best.json").read_text())["valid_loss"] <= best["valid_loss"]
    kept = json.loads((place.run / "best.json").read_text())["step"]
    assert {folder.name for folder in place.run.glob("step-*") if (folder / COMPLETE).exists()} == {
        f"step-{kept:08d}",
        "step-00000020",
    }


def test_what_is_not_the_runs_stays_where_it_is(place: Place) -> None:
    """A bucket may hold data and other runs below the same URL."""
    others = ["data/train/000.npy", "ablation/metrics.jsonl", "ablation/step-00000100/COMPLETE", "model.safetensors"]
    for name in others:
        (place.run / name).parent.mkdir(parents=True, exist_ok=True)
        (place.run / name).write_text("theirs")
    place.train("a", "--train-steps", 5)
    (place.here("a") / "core").write_text("of a crash")
    (place.here("a") / "sketches").mkdir()
    (place.here("a") / "sketches" / "step-00000005.png").write_text("drawn")
    place.train("a", "--train-steps", 10)
    place.train("b", "--train-steps", 15)
    assert [(place.run / name).read_text() for name in others] == ["theirs"] * 4
    assert not (place.run / "core").exists()
    here = place.here("b")
    assert (here / "sketches" / "step-00000005.png").read_text() == "drawn"
    assert not any((here / name).exists() for name in others)


def test_a_file_is_no_place_for_a_run(place: Place) -> None:
    place.run.parent.mkdir()
    place.run.write_text("a model, perhaps")
    assert "Not a directory" in place.train("a", code=2)
    Bucket("memory://bucket", "--x").write("run", b"in a store, names with such a beginning may be there too")
    with pytest.raises(InputError, match="--x memory://bucket/run is a file; name a folder"):
        layout_of(Bucket("memory://bucket/run", "--x"))


def test_a_full_disk_is_not_the_buckets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.train("a", "--train-steps", 5)

    def download(files: object, source: str, target: Path) -> str:
        target.write_bytes(b"what fits")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "download", download)
    assert "No space left on device; make room for its copy on this machine" in place.train("b", code=1)
    assert list(place.here("b").rglob(".arriving-*")) == []


def test_where_the_last_checkpoint_cannot_be_saved_the_one_before_is_sent(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = saver.checkpoint.save

    def fail_at_the_end(*args: Any, training: dict[str, Any], **rest: Any) -> Path:
        if training["step"] == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args, training=training, **rest)

    monkeypatch.setattr(saver.checkpoint, "save", fail_at_the_end)
    text = place.train("a", "--upload-interval", 100, code=1)
    assert f"step 20 was not saved; fix the error above; the newest checkpoint in {place.url} is of step 15" in text
    assert (place.run / "step-00000015" / COMPLETE).exists()


def test_a_long_wait_at_the_end_is_explained(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    send_whole = mirror.send_whole

    def slowly(*args: Any) -> int:
        time.sleep(1.0)
        return send_whole(*args)

    monkeypatch.setattr(mirror, "send_whole", slowly)
    monkeypatch.setattr(mirror, "_QUIET_SECONDS", 0.1)
    text = place.train("a", "--upload-interval", 100)
    assert text.count("waiting until step-00000020 is sent\n") == 1


def test_upload_interval(place: Place) -> None:
    place.train("a", "--upload-interval", 10)
    steps = [json.loads(line)["step"] for line in (place.run / "uploads.jsonl").read_text().splitlines()]
    assert steps == [10, 20]


def test_validation_alone(place: Place) -> None:
    place.train("a", "--train-steps", 10)
    text = place.train("b", "--do-test")
    assert "perplexity" in text
    assert len((place.run / "test.jsonl").read_text().splitlines()) == 1
    with lease.held(Bucket(place.url, "--x"), "--x", place.folder / "record", print):  # by a run on another machine
        assert "perplexity" in place.train("c", "--do-test")


@pytest.mark.parametrize("device", ["torch", pytest.param("xla", marks=pytest.mark.slow)])
def test_two_processes_on_machines_of_their_own(place: Place, unbroken: Path, device: str) -> None:
    """Each process has a home of its own, as hosts without a shared disk have."""
    program = "tests/workers/own_machine_worker.py"
    flags = [*place.data_flags, *RUN, "--checkpoints-dir", place.url]
    homes = {"MACHINES": str(place.folder / "machines")} | ({"PJRT_DEVICE": "CPU"} if device == "xla" else {})
    succeed(torchrun(2, *flags, "--train-steps", 10, program=program, GLOO_SOCKET_IFNAME="lo", **homes))
    shutil.rmtree(place.folder / "machines" / "1")
    shutil.rmtree(place.run / "step-00000010")  # which only the first machine has then
    (place.run / "latest").write_text("step-00000005")
    text = succeed(torchrun(2, *flags, program=program, GLOO_SOCKET_IFNAME="lo", **homes))
    assert "after step 10" in text
    assert training_losses(place.run) == pytest.approx(training_losses(unbroken), rel=1e-5)
    assert len(list((place.folder / "machines" / "1").rglob("step-00000010"))) == 1


def test_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.1)
    monkeypatch.setattr(lease, "EXPIRES_AFTER", 1.5)
    bucket, said, lost = Bucket(f"file://{tmp_path}/run", "--checkpoints-dir"), [], []
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with lease.held(bucket, "--checkpoints-dir x", ours, said.append) as first:
        with pytest.raises(InputError, match=r"in use by process \d+ on "):
            lease.refuse_if_held(bucket, "--checkpoints-dir x", theirs, said.append)
        with (
            pytest.raises(InputError, match="in use by process"),
            lease.held(bucket, "--checkpoints-dir x", theirs, said.append),
        ):
            pass
        first.check()
    assert lease.is_own(lease.newest(bucket), ours)
    # One that was killed is no longer renewed.
    with lease.held(bucket, "x", ours, said.append, lost=lost.append) as killed:
        killed._end.set()
        killed._thread.join()
        with lease.held(bucket, "x", theirs, said.append) as taken:
            assert "waiting up to" in said[-1]
            with pytest.raises(lease.LeaseLost, match="was taken over by process"):
                killed.check()
            taken.check()
    assert len(lost) == 1
    # On the machine of the killed one nobody waits.
    said.clear()
    with lease.held(bucket, "x", ours, said.append) as killed:
        killed._end.set()
        with lease.held(bucket, "x", ours, said.append):
            assert said == []


def test_what_a_killed_process_asked_the_time_with_is_cleared_away(tmp_path: Path) -> None:
    bucket = Bucket(f"file://{tmp_path}/run", "--checkpoints-dir")
    for number in range(1, 13):
        with lease.held(bucket, "x", tmp_path / "ours", print):
            bucket.write(f"lease/probe-{number}", b"")
    with lease.held(bucket, "x", tmp_path / "ours", print):
        assert sorted(bucket.files("lease")) == [f"lease/{number:08d}.json" for number in range(4, 14)]


def test_a_run_that_began_meanwhile(tmp_path: Path) -> None:
    bucket = Bucket(f"file://{tmp_path}/run", "--checkpoints-dir")
    seen = lease.newest(bucket)
    with lease.held(bucket, "x", tmp_path / "theirs", print):
        pass
    with (
        pytest.raises(InputError, match="has written there since"),
        lease.held(bucket, "x", tmp_path / "ours", print, after=seen),
    ):
        pass
