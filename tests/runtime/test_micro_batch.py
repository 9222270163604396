"""--train-batch-size auto: which micro-batch each kind of device gets, and that it changes no loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, metrics, run_here, run_xla, succeed

from gpt2xla.config import PRESETS, RunConfig, TorchConfig, XlaConfig
from gpt2xla.config.batch import divisors
from gpt2xla.errors import InputError
from gpt2xla.runtime.base import GIB, Memory
from gpt2xla.runtime.memory import compiled_step_bytes
from gpt2xla.runtime.torch.accelerators import Accelerator, Cpu, Cuda
from gpt2xla.runtime.torch.runtime import TorchRuntime
from gpt2xla.runtime.trial import Trial
from gpt2xla.runtime.xla.compiler_messages import HBM_GIB
from gpt2xla.runtime.xla.memory import XlaMemory
from gpt2xla.runtime.xla.pallas_choice import blocks_are_kernels
from gpt2xla.tpu_check.topologies import TOPOLOGIES
from gpt2xla.training.micro_batch import DeviceTrial, choose

SMALL = (
    "--vocab-size 97 --seq-length 16 --d-model 32 --num-layers 2 --num-heads 2 --eval-batch-size 4 --valid-steps 2 "
    "--train-steps 4 --warmup-steps 0 --learning-rate 0.01 --sequences-per-update 12"
).split()
TINY = {"vocab_size": 64, "seq_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 2}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


@pytest.mark.parametrize(("sequences", "devices"), [(256, 8), (12, 1), (7, 7), (30, 2)])
def test_every_candidate_makes_the_same_update(sequences: int, devices: int) -> None:
    found = divisors(sequences, devices)
    assert found == [n for n in range(sequences, 0, -1) if sequences % (n * devices) == 0]
    trial = Trial(RunConfig.from_flat(TINY | {"sequences_per_update": sequences}), devices)
    for share in trial.shares:
        train = trial.config_of(share).train
        assert train.micro_batch_size * train.micro_steps == sequences
        assert train.micro_batch_size == share * devices


def test_an_update_that_does_not_divide_is_one_line() -> None:
    runtime = SimpleNamespace(devices=8, train=RunConfig().train)
    with pytest.raises(
        InputError, match=r"^--sequences-per-update 250 does not divide over 8 devices; use a multiple of 8"
    ):
        choose(RunConfig.from_flat(TINY | {"sequences_per_update": 250}), runtime)  # type: ignore[arg-type]


def test_losses_are_those_of_any_other_split(data_flags: list[str], tmp_path: Path) -> None:
    splits = {"auto": [], "one": ["--train-batch-size", 1], "accum": ["--gradient-accum-step", 3]}
    shown = {}
    for name, split in splits.items():
        folder = tmp_path / name
        shown[name] = succeed(run_here("run_pretrain.py", *data_flags, *SMALL, *split, "--checkpoints-dir", folder))
    assert (
        "micro-batch: 12 sequences per device; --train-batch-size 12 --gradient-accum-step 1 for 12 " in shown["auto"]
    )
    assert "micro-batch:" not in shown["one"]
    for name in splits:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "auto"), abs=1e-5)


def test_a_resumed_run_keeps_its_numbers(data_flags: list[str], tmp_path: Path) -> None:
    """Whatever fits by then. Rerunning the same command is no request for another choice."""
    flags = [*data_flags, *SMALL, "--checkpoints-dir", tmp_path, "--save-interval", 2]
    succeed(run_here("run_pretrain.py", *flags))
    stored = json.loads((tmp_path / "run_config.json").read_text())
    assert [stored["train_batch_size"], stored["gradient_accum_step"]] == [12, 1]
    for words, numbers, changed in (
        (["--train-batch-size", "auto"], [12, 1], False),
        ([], [12, 1], False),
        (["--train-batch-size", 4], [4, 3], True),
    ):
        output = succeed(run_here("run_pretrain.py", *flags, *words, "--train-steps", stored["train_steps"] + 2))
        stored = json.loads((tmp_path / "run_config.json").read_text())
        assert [stored["train_batch_size"], stored["gradient_accum_step"]] == numbers
        assert "micro-batch:" not in output
        assert ("changed: --train-batch-size 12 -> 4" in output) == changed


@pytest.mark.slow
def test_xla_compiles_one_more_at_most_and_remembers(data_flags: list[str], tmp_path: Path) -> None:
    """The first try is refused, as a TPU's compiler does, with figures by which 2 sequences fit."""
    small = [*SMALL, "--num-layers", 1, "--sequences-per-update", 4]
    result = run_xla(tmp_path, 2, *data_flags, *small, program="tests/workers/micro_batch_worker.py")
    lines = succeed(result).splitlines()
    first, noted, given = (json.loads(line) for line in lines if line.startswith('{"compiles"'))
    assert first == {"compiles": 2, "refused": [4], "numbers": [2, 2, None]}, "the training step and validation"
    assert noted == given == {"compiles": 0, "refused": [], "numbers": [2, 2, None]}, "the programs of the first run"
    said = [line for line in lines if line.startswith("micro-batch: 2 sequences per device")]
    assert [line.endswith(", as an earlier run found") for line in said] == [False, True]
    assert sum(line.startswith("compiling the training step") for line in lines) == 2 + 2, "twice in the first run"
    for name in ("noted", "given"):
        assert losses(tmp_path / name) == losses(tmp_path / "first")
    torch_folder = tmp_path / "torch"
    succeed(run_here("run_pretrain.py", *data_flags, *small, "--checkpoints-dir", torch_folder))
    assert losses(torch_folder) == pytest.approx(losses(tmp_path / "first"), abs=1e-5)


class CompiledTrial(Trial):
    """A compiler that needs so many bytes for a sequence, besides the state."""

    tried: list[int]

    def update(self, share: int) -> None:
        self.tried = [*getattr(self, "tried", []), share]
        needed, memory = share * 3 * GIB, 15.75 * GIB - 16 * self.parameters
        if needed > memory:
            raise RuntimeError(f"Used {needed / GIB:.2f}G of 15.75G hbm. Exceeded hbm capacity")


def test_a_compilers_figures_give_the_next_try() -> None:
    trial = CompiledTrial(RunConfig.from_flat(PRESETS["gpt2"] | {"mixed_precision": "bf16"}), 8)
    assert XlaMemory("TPU v5 lite").most_that_fit(trial) == 4
    assert trial.tried == [32, 4]


def test_an_error_that_is_not_of_memory_ends_the_trial() -> None:
    class Broken(Trial):
        def update(self, share: int) -> None:
            raise RuntimeError("INVALID_ARGUMENT: shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        XlaMemory("TPU v5 lite").most_that_fit(Broken(RunConfig.from_flat(PRESETS["gpt2"]), 8))


def verdicts() -> Iterator[tuple[str, str, int, int]]:
    for row in json.loads((ROOT / "benchmarks/results/tpu_fits.json").read_text()):
        if not row["sharded"]:
            yield row["model"], row["topology"], row["sequences_per_device"], row["too_many"]


@pytest.mark.parametrize(("model", "topology", "fits", "too_many"), verdicts())
def test_the_formula_is_near_the_compilers_verdicts(model: str, topology: str, fits: int, too_many: int) -> None:
    """Below the fewest that libtpu refused, and no less than five sixths of the most that it took."""
    config = RunConfig.from_flat(
        PRESETS[model] | {"train_batch_size": 8, "gradient_accum_step": 1, "vocab_size": 50304}
    )
    parameters = Trial(RunConfig.from_flat(PRESETS[model] | {"vocab_size": 50304}), 8).parameters
    found = TOPOLOGIES[topology]
    kernels = blocks_are_kernels(found.kind, config.model, config.train, spmd=False)

    def fits_by_formula(share: int) -> bool:
        needed = compiled_step_bytes(config.model, config.train, parameters, share, kernels=kernels)
        return needed <= found.memory * GIB

    assert kernels == topology.startswith(("v5e", "v6e"))
    assert fits * 5 // 6 <= max(filter(fits_by_formula, range(1, 200))) < too_many


def test_a_note_is_for_one_step_on_one_kind_of_device(tmp_path: Path) -> None:
    def remembered(kind: str = "TPU v5 lite", devices: int = 8, **options: object) -> int | None:
        config = RunConfig.from_flat(PRESETS["gpt2"] | options)
        return XlaMemory(kind, XlaConfig(compile_cache=str(tmp_path))).remembered(Trial(config, devices))

    trial = Trial(RunConfig.from_flat(PRESETS["gpt2"]), 8)
    XlaMemory("TPU v5 lite", XlaConfig(compile_cache=str(tmp_path))).remember(trial, 16)
    assert remembered() == remembered(train_steps=7, valid_interval=3) == 16
    others = [{"kind": "TPU v3"}, {"devices": 4}, {"dropout": 0.1}, {"attention": "chunked"}, {"optim_type": "muon"}]
    assert [remembered(**other) for other in others] == [None] * len(others)  # type: ignore[arg-type]
    (note,) = (tmp_path / "micro-batches").iterdir()
    for damage in ("", "[]", '{"sequences_per_device": 5}', "{"):
        note.write_text(damage)
        assert remembered() is None
    XlaMemory("TPU v5 lite").remember(trial, 16)  # --compile-cache ''
    assert len(list((tmp_path / "micro-batches").iterdir())) == 1


def test_a_gpu_tries_until_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its memory, a tenth is spared while it tries."""
    card = Cuda.__new__(Cuda)  # which finds no GPU here
    card.device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))

    class Rehearsed(Trial):
        def rehearse(self, share: int) -> bool:
            tried.append(share)
            return share <= most

    for most in (300, 128, 100, 1, 0):
        tried: list[int] = []
        trial = Rehearsed(RunConfig.from_flat(TINY), 1)
        assert card.most_that_fit(trial) == max([n for n in trial.shares if n <= most], default=1)
        assert len(tried) <= 4
    card.can_try = False  # under --fsdp
    assert card.most_that_fit(trial) == 32


@pytest.mark.parametrize("limit", [20, 3])
def test_a_rehearsal_uses_the_kernels_of_its_own_size(limit: int) -> None:
    """In the whole loop, with a device that has room for so many sequences."""
    runtime, sizes = TorchRuntime(TorchConfig(), RunConfig().train), []

    class Card(Cpu):
        most_that_fit = Cuda.most_that_fit

        def has_room_for(self, work: Callable[[], None]) -> bool | None:
            size = runtime.train.micro_batch_size
            sizes.append(size)
            return Accelerator.has_room_for(self, work) and size <= limit

    runtime.memory = Card()
    patched = SimpleNamespace(total_memory=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: patched)
        found = choose(RunConfig.from_flat(TINY | {"sequences_per_update": 32}), runtime)
    expected = max(n for n in (1, 2, 4, 8, 16, 32) if n <= limit)
    assert found.train.micro_batch_size == runtime.train.micro_batch_size == expected
    assert found.train.micro_steps == 32 // expected
    assert len(set(sizes)) == len(sizes) <= 3


def test_a_cpu_goes_by_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(RunConfig.from_flat(PRESETS["gpt2"]), 1)
    found = []
    for free in (None, 100 * GIB, 12 * GIB, 1):
        monkeypatch.setattr(Cpu, "free", lambda self, free=free: free)
        found.append(Cpu().most_that_fit(trial))
    assert found[:2] == [32, 32]
    assert 32 > found[2] > found[3] == 1
    assert Memory().most_that_fit(Trial(trial.config, 8)) == 4, "32 over all devices"
    assert HBM_GIB.keys() == {topology.kind for topology in TOPOLOGIES.values()}


def test_all_processes_take_what_fits_each(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TorchRuntime(TorchConfig(), RunConfig().train)
    monkeypatch.setattr(runtime, "gather", lambda value: [value, value / 2])
    config = choose(RunConfig.from_flat(TINY | {"sequences_per_update": 32}), runtime)
    assert config.train.micro_batch_size == 16
    assert isinstance(DeviceTrial(RunConfig.from_flat(TINY), runtime), Trial)
