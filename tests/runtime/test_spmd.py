"""SPMD and FSDP on eight devices of one process, against the torch runtime; and checkpoints that move between them all."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_RUN, metrics, run_here, run_xla, succeed, training_losses
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import DefaultSavePlanner
from transformers import AutoModelForCausalLM

from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint import seal
from gpt2xla.checkpoint.start import find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig
from gpt2xla.errors import InputError
from gpt2xla.runtime import sharded_state

RELATIVE = 1e-5
LAYOUTS = {"spmd": ["--spmd"], "fsdp": ["--spmd", "--fsdp"]}


@pytest.fixture(scope="module")
def flags(data_flags: list[str]) -> list[str]:
    return [*data_flags, *SMALL_RUN, "--train-batch-size", "8", "--eval-batch-size", "8"]


@pytest.fixture(scope="module")
def runs(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints folders of the same 20 steps: "torch" on one CPU, "spmd" and "fsdp" on eight devices. The latter two hold
    what tests/workers/spmd_worker.py printed in counts.json."""
    root = tmp_path_factory.mktemp("runs")
    succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", root / "torch"))
    for name, layout in LAYOUTS.items():
        arguments = (*flags, *layout, "--checkpoints-dir", root / name)
        output = succeed(run_spmd(8, *arguments, program="tests/workers/spmd_worker.py"))
        (root / name / "counts.json").write_text(output.splitlines()[-1])
    return {name: root / name for name in ("torch", *LAYOUTS)}


def run_spmd(devices: int, *arguments: object, **options: str) -> subprocess.CompletedProcess[str]:
    return run_xla(*arguments, CPU_NUM_DEVICES=str(devices), **options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "step-00000020" / "model.safetensors")


@pytest.mark.parametrize("name", LAYOUTS)
def test_eight_devices_equal_torch(runs: dict[str, Path], name: str) -> None:
    ours, theirs = metrics(runs[name]), metrics(runs["torch"])
    for key, tolerance in (("loss", RELATIVE), ("grad_norm", 1e-4), ("valid_loss", RELATIVE), ("valid_tokens", 0)):
        values = [[line[key] for line in lines if key in line] for lines in (ours, theirs)]
        assert len(values[0]) == (20 if key in ("loss", "grad_norm") else 2)
        assert values[0] == pytest.approx(values[1], rel=tolerance), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_with_validation_and_saves_compiles_two_graphs(runs: dict[str, Path], name: str) -> None:
    assert json.loads((runs[name] / "counts.json").read_text())["compiles"] == 2


def test_fsdp_leaves_each_device_an_eighth(runs: dict[str, Path]) -> None:
    """Weights and both moments: 28,608 of 29,088 numbers are in matrices, of which only wte's 97 rows do not divide by 8,
    and its columns do; biases and layer norms are whole everywhere."""
    counts = json.loads((runs["fsdp"] / "counts.json").read_text())
    vectors = 3 * 4 * sum(t.numel() for t in weights_of(runs["torch"]).values() if t.dim() == 1)
    assert counts["on_device"] == [vectors + (counts["whole"] - vectors) // 8] * 8
    assert counts["on_device"][0] < counts["whole"] / 6
    replicated = json.loads((runs["spmd"] / "counts.json").read_text())
    assert replicated["on_device"] in ([replicated["whole"]] * 8, [replicated["whole"]])


def test_replicas_share_muons_matrices(runs: dict[str, Path]) -> None:
    assert json.loads((runs["spmd"] / "counts.json").read_text())["shared"] == [2, 2, 2]


def test_fsdp_stores_adams_state_in_a_file_per_device_without_a_pickle(runs: dict[str, Path]) -> None:
    folder = runs["fsdp"] / "step-00000020"
    parts = sorted((folder / checkpoint.SHARDS).iterdir())
    assert [part.suffix for part in parts] == [".safetensors"] * 8
    listed = json.loads((folder / "COMPLETE").read_text())["files"]
    assert {f"{checkpoint.SHARDS}/{part.name}" for part in parts} < listed.keys()
    assert seal.find_damage(folder) is None
    assert not list(runs["fsdp"].glob(".step-*"))
    stored = [training_of(runs[name])["optimizer"] for name in ("fsdp", "torch")]
    assert stored[0]["step"] == stored[1]["step"] == 20
    for key in ("exp_avg", "exp_avg_sq"):
        for name, moment in stored[1][key].items():
            torch.testing.assert_close(stored[0][key][name], moment, rtol=1e-3, atol=1e-7)


def test_a_device_without_streams_does_not_stop_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_xla imports torchax where flax is installed, as on Colab and Kaggle, and it adds such a device to torch."""
    device = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(torch, torch._C._get_privateuse1_backend_name(), device, raising=False)
    state = {"exp_avg": {"wte.weight": torch.arange(6.0).reshape(2, 3)}}
    sharded_state.save(tmp_path / "shards", state, DefaultSavePlanner(), devices=1, distributed=False)
    (part,) = (tmp_path / "shards").iterdir()
    assert load_file(part)["exp_avg.wte.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def training_of(root: Path) -> dict:
    training = find_start(parse_run(TorchConfig, ["--checkpoints-dir", str(root)])[0]).training
    assert training is not None
    return training


@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_a_damaged_part_is_noticed(runs: dict[str, Path], tmp_path: Path, harm: str) -> None:
    root = Path(shutil.copytree(runs["fsdp"], tmp_path / "run"))
    part = sorted((root / "step-00000020" / checkpoint.SHARDS).iterdir())[3]
    if harm == "flip":
        contents = bytearray(part.read_bytes())
        contents[-1] ^= 1
        part.write_bytes(contents)
    else:
        part.unlink()
    start = find_start(parse_run(TorchConfig, ["--checkpoints-dir", str(root)])[0])
    assert start.step == 10
    assert part.name in start.notes[0]


@pytest.mark.parametrize("harm", ["missing part", "no offsets", "not safetensors"])
def test_parts_that_are_not_the_whole_state_are_one_line(runs: dict[str, Path], tmp_path: Path, harm: str) -> None:
    """COMPLETE agrees with all of these: they were made so."""
    root = Path(shutil.copytree(runs["fsdp"], tmp_path / "run"))
    folder = root / "step-00000020"
    part = sorted((folder / checkpoint.SHARDS).iterdir())[3]
    if harm == "missing part":
        part.unlink()
    elif harm == "no offsets":
        save_file(load_file(part), part)
    else:
        part.write_bytes(b"\x00" * 64)
    seal.seal(folder, 20)
    with pytest.raises(InputError, match=f"{checkpoint.SHARDS} does not hold the state"):
        find_start(parse_run(TorchConfig, ["--checkpoints-dir", str(root)])[0])


def test_hugging_face_loads_the_gathered_weights(runs: dict[str, Path]) -> None:
    ids = torch.arange(16)[None]
    models = [AutoModelForCausalLM.from_pretrained(runs[n] / "step-00000020").eval() for n in ("fsdp", "torch")]
    torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [pytest.param("spmd", marks=pytest.mark.slow), "fsdp"])
def test_a_resumed_run_is_bit_identical(runs: dict[str, Path], name: str, flags: list[str], tmp_path: Path) -> None:
    source = runs[name] / "step-00000010"
    more = [*LAYOUTS[name], "--from-checkpoint", source, "--checkpoints-dir", tmp_path]
    assert "after step 10" in succeed(run_spmd(8, *flags, *more))
    assert training_losses(tmp_path) == training_losses(runs[name])[10:]
    ours, theirs = weights_of(tmp_path), weights_of(runs[name])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("source", "devices", "layout"),
    [
        ("fsdp", 0, "torch"),
        ("torch", 8, "fsdp"),
        pytest.param("fsdp", 1, "xla", marks=pytest.mark.slow),
        pytest.param("fsdp", 1, "fsdp", marks=pytest.mark.slow),
        pytest.param("fsdp", 4, "spmd", marks=pytest.mark.slow),
        pytest.param("fsdp", 2, "fsdp", marks=pytest.mark.slow),
        pytest.param("spmd", 0, "torch", marks=pytest.mark.slow),
        pytest.param("spmd", 8, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_move(
    runs: dict[str, Path], source: str, devices: int, layout: str, flags: list[str], tmp_path: Path
) -> None:
    more = [*flags, "--from-checkpoint", runs[source] / "step-00000010", "--checkpoints-dir", tmp_path]
    if layout == "torch":
        succeed(run_here("run_pretrain.py", *more))
    else:
        succeed(run_spmd(devices, *more, *LAYOUTS.get(layout, [])))
    assert training_losses(tmp_path) == pytest.approx(training_losses(runs["torch"])[10:], rel=RELATIVE)


@pytest.mark.slow
def test_blocks_that_run_forward_again_gather_then(runs: dict[str, Path], flags: list[str], tmp_path: Path) -> None:
    more = [*LAYOUTS["fsdp"], "--activation-checkpointing", "block", "--checkpoints-dir", tmp_path]
    succeed(run_spmd(8, *flags, *more))
    assert training_losses(tmp_path) == pytest.approx(training_losses(runs["torch"]), rel=RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_sync_free_optimizer_too(runs: dict[str, Path], name: str, flags: list[str], tmp_path: Path) -> None:
    more = [*LAYOUTS[name], "--use-syncfree-optim", "--checkpoints-dir", tmp_path]
    succeed(run_spmd(8, *flags, *more))
    assert training_losses(tmp_path) == pytest.approx(training_losses(runs["torch"]), rel=RELATIVE)
    assert [line["compiles"] for line in metrics(tmp_path) if "compiles" in line][-1] == 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--fsdp"], "--fsdp needs --spmd"),
        (["--spmd", "--ddp"], "leave --ddp out"),
        (["--spmd", "--train-batch-size", "12"], "--train-batch-size 12 does not divide over 8 devices"),
    ],
)
def test_what_cannot_work_is_one_line(wrong: list[str], says: str, flags: list[str], tmp_path: Path) -> None:
    result = run_spmd(8, *flags, *wrong, "--checkpoints-dir", tmp_path)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert says in line
    assert "Traceback" not in result.stderr
