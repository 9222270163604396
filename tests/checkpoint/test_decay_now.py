"""--decay-now: a decay from a checkpoint is the run that was planned with it; it resumes, is trained on from, or is refused.

`tests/faults/decays.py` kills such runs at random moments."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, metrics, run_here, succeed
from safetensors.torch import load_file

from gpt2xla.checkpoint.start import Start, find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig
from gpt2xla.errors import InputError
from gpt2xla.optim.schedule import learning_rate

WSD = [*SMALL_RUN, "--decay-method", "wsd", "--warmup-steps", "2", "--decay-steps", "4", "--save-interval", "5"]


@pytest.fixture(scope="module")
def wsd(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    """The folder of a run of 20 steps whose final decay begins after step 16."""
    folder = tmp_path_factory.mktemp("wsd")
    train(*data_flags, *WSD, "--checkpoints-dir", folder)
    return folder


def train(*flags: object) -> str:
    return succeed(run_here("run_pretrain.py", *flags))


def start(*flags: object) -> Start:
    return find_start(parse_run(TorchConfig, [*map(str, flags)])[0])


def check_same(folder: Path, expected: Path, steps: int, after: int) -> None:
    """Weights, optimizer and all lines of training and validation are the same, bit for bit."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "valid_loss")
    ours, theirs = ([{k: line[k] for k in keys if k in line} for line in metrics(f)] for f in (folder, expected))
    assert ours == [line for line in theirs if line["step"] > after]
    ends = [f / f"step-{steps:08d}" for f in (folder, expected)]
    weights = [load_file(end / "model.safetensors") for end in ends]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    states = [torch.load(end / "training_state.pt", weights_only=True)["optimizer"] for end in ends]
    assert all(torch.equal(states[0][m][n], t) for m in ("exp_avg", "exp_avg_sq") for n, t in states[1][m].items())


def test_a_decay_is_the_run_planned_with_it_and_resumes_with_and_without_its_flags(
    wsd: Path, data_flags: list[str], tmp_path: Path
) -> None:
    train(*data_flags, *WSD, "--train-steps", 16, "--decay-steps", 6, "--checkpoints-dir", tmp_path / "planned")
    decay = tmp_path / "decay"
    here = ["--checkpoints-dir", decay]
    command = [*here, "--resume", wsd / "step-00000010", "--decay-now", 6, "--save-interval", 2]
    printed = train(*command)
    assert "decay: from 1.00e-02 after step 10 to 1.00e-03 at step 16, where the run ends" in printed
    assert "then constant, 1-sqrt decay from step 10 to 1.00e-03 at step 16" in printed
    check_same(decay, tmp_path / "planned", steps=16, after=10)
    assert "is the end of the run" in train(*command)
    for again in (command, here):  # as after a crash in step 13
        shutil.rmtree(decay / "step-00000014")
        shutil.rmtree(decay / "step-00000016")
        assert "after step 12" in train(*again)
        check_same(decay, tmp_path / "planned", steps=16, after=10)
    (tmp_path / "run.json").write_text((decay / "run_config.json").read_text())
    assert start("--config", tmp_path / "run.json").is_finished
    printed = train(*here, "--train-steps", 30)
    assert (
        "the learning rate goes back up from 1.00e-03 to 1.00e-02 after step 16; its final decay is from step 26"
        in printed
    )
    assert {line["lr"] for line in metrics(decay) if "lr" in line and 16 < line["step"] <= 26} == {0.01}
    saved = json.loads((decay / "run_config.json").read_text())
    assert (saved["decay_now"], saved["decay_steps"], saved["resume"]) == (None, 4, "auto"), "as before the decay"
    assert start("--checkpoints-dir", wsd).is_finished, "the first run is as it was"


def test_a_decay_from_a_url_continues_on_a_machine_without_its_copy(
    wsd: Path, data_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, decay = f"file://{tmp_path}/run/step-00000010", tmp_path / "decay"
    shutil.copytree(wsd / "step-00000010", tmp_path / "run" / "step-00000010")
    command = ["--checkpoints-dir", decay, "--resume", address, "--decay-now", 6, "--save-interval", 2]
    for home in ("here", "there"):
        monkeypatch.setenv("HOME", str(tmp_path / home))
        assert "after step 1" in train(*command)
        shutil.rmtree(decay / "step-00000016")
    shutil.rmtree(tmp_path / "run")  # as its run may have done
    assert "after step 14" in train(*command)
    assert "is the end of the run" in train(*command)
    train(*data_flags, *WSD, "--train-steps", 16, "--decay-steps", 6, "--checkpoints-dir", tmp_path / "planned")
    check_same(decay, tmp_path / "planned", steps=16, after=10)


def test_a_decay_in_the_same_folder_sets_later_checkpoints_aside_and_continues_when_its_source_is_gone(
    wsd: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(wsd, tmp_path / "run", symlinks=True)
    command = ["--checkpoints-dir", folder, "--resume", folder / "step-00000010", "--decay-now", 6]
    printed = train(*command, "--save-interval", 2, "--saved-checkpoint-limit", 2)
    assert "set aside: step-00000015" in printed
    assert not (folder / "step-00000010").exists()
    shutil.rmtree(folder / "step-00000016")
    assert "after step 14" in train(*command)
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [*range(1, 17)]
    other = ["--checkpoints-dir", folder, "--resume", folder / "step-00000010", "--decay-now", 7]
    with pytest.raises(InputError, match="no such checkpoint folder"):
        start(*other)


def test_a_constant_run_has_its_final_decay_only_now(wsd: Path, tmp_path: Path) -> None:
    source = shutil.copytree(wsd / "step-00000010", tmp_path / "step-00000010")
    _edit(source, decay_method="constant", decay_steps=0)
    asked = ["--checkpoints-dir", tmp_path / "new", "--resume", source, "--decay-now", 3, "--decay-shape", "linear"]
    schedule = start(*asked).config.schedule
    assert [learning_rate(schedule, 32, step) for step in (9, 10, 11, 12)] == pytest.approx([0.01, 0.01, 0.007, 0.004])
    assert start("--checkpoints-dir", tmp_path / "new", "--from-checkpoint", source).config.schedule.final_decay == 0


def test_what_cannot_decay_is_refused(wsd: Path, trained: Path, tmp_path: Path) -> None:
    new, at = ["--checkpoints-dir", tmp_path / "new"], wsd / "step-00000010"
    early = shutil.copytree(at, tmp_path / "step-00000010")
    _edit(early, warmup_steps=11)
    low = shutil.copytree(at, tmp_path / "low" / "step-00000010")
    _edit(low, min_lr=0.02)
    for flags, message in {
        ("--decay-now", 5): r"--decay-now 5 continues a run: add --resume PATH",
        ("--decay-now", 5, "--from-checkpoint", at): r"add --resume PATH",
        ("--decay-now", 5, "--resume", at, "--do-test"): r"add --resume PATH",
        ("--decay-now", 0, "--resume", at): r"--decay-now 0: choose a number of at least 1",
        ("--decay-now", 5, "--resume", tmp_path / "none"): r"--resume .*none: no such checkpoint folder",
        ("--decay-now", 5, "--resume", at, "--train-steps", 30): r"sets how the run ends; leave --train-steps out",
        ("--decay-now", 5, "--resume", at, "--epochs", 1): r"leave --epochs out",
        ("--decay-now", 5, "--resume", at, "--decay-steps", 9): r"leave --decay-steps out",
        (
            "--decay-now",
            5,
            "--resume",
            trained / "step-00000010",
        ): r"trained with --decay-method cosine, which decays all",
        ("--decay-now", 5, "--resume", trained / "step-00000010", "--decay-method", "wsd"): r"decays all the time",
        (
            "--decay-now",
            5,
            "--resume",
            at,
            "--decay-method",
            "linear",
        ): r"--decay-now has no meaning with --decay-method li",
        ("--decay-now", 5, "--resume", wsd / "step-00000020"): r"in or after a final decay, which began at step 16",
        ("--decay-now", 5, "--resume", early): r"lies in the warm-up of 11 steps; choose a checkpoint after it",
        ("--decay-now", 5, "--resume", low): r"--min-lr 0.02 is above --learning-rate 0.01",
    }.items():
        with pytest.raises(InputError, match=message):
            start(*new, *flags)
    with pytest.raises(InputError, match=r"already holds step-00000020 of another run"):
        start("--checkpoints-dir", trained, "--decay-now", 5, "--resume", at)
    assert not (tmp_path / "new").exists()


def _edit(checkpoint: Path, **options: object) -> None:
    """Change the options of a checkpoint, and seal it again."""
    from gpt2xla.checkpoint.seal import seal

    file = checkpoint / "run_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    seal(checkpoint, 10)
