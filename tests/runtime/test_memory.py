"""Memory that runs out: on a CPU for real, within a limited address space; of absent devices, by their words."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL_RUN, succeed, torchrun

from gpt2xla.config import ModelConfig, TorchConfig, TrainConfig
from gpt2xla.errors import RunFailed, is_out_of_memory
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import GIB, Shortage
from gpt2xla.runtime.memory import (
    eval_advice,
    explain_out_of_memory,
    first_that_fits,
    host_step_bytes,
    host_warning,
    same_update,
    train_advice,
)
from gpt2xla.runtime.torch.accelerators import Cpu, Cuda
from gpt2xla.runtime.torch.compile import CompiledBlock
from gpt2xla.runtime.torch.host_memory import free_host_memory
from gpt2xla.runtime.torch.runtime import TorchRuntime
from gpt2xla.runtime.xla.compiler_messages import compiler_figures
from gpt2xla.runtime.xla.memory import XlaMemory

TRAIN = TrainConfig(train_batch_size=64, gradient_accum_step=8, eval_batch_size=64)

# libtpu 0.0.21 for a v5e, of 1024 sequences per device of one layer of GPT-2; its list of arrays is longer.
TPU_REFUSES = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 39.25G of 15.75G hbm. Exceeded hbm capacity by 23.50G.

Total hbm usage >= 39.50G:
    reserved        258.00M
    program          39.25G
    arguments            0B

Output size 0B; shares 0B with arguments.

Program hbm requirement 39.25G:
    global            80.5K
    HLO temp         39.25G (42.6% utilization: Unpadded (16.73G) Padded (39.23G), 0.1% fragmentation (28.36M))

  Largest program allocations in hbm:

  1. Size: 1.50G
     Shape: bf16[1024,1024,768]{1,2,0:T(8,128)(2,1)}
     Unpadded size: 1.50G
     Allocation type: HLO temp
     ==========================
"""

# `run_pretrain.py` in a process that may map some GiB more than torch itself does.
LIMITED = """
import resource, runpy, sys
import gpt2xla.runtime.torch.runtime, gpt2xla.training.pretrain
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = mapped + int(float(sys.argv[1]) * 2**30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = ["run_pretrain.py", *sys.argv[2:]]
runpy.run_path("run_pretrain.py", run_name="__main__")
"""


def run_limited(gib: float, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(gib), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
        # glibc would map 64 MB for a thread whenever two of them happen to ask for memory at once.
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip


def test_a_rehearsal_compiles_nothing_and_announces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT2(ModelConfig(vocab_size=31, seq_length=8, d_model=16, num_layers=1, num_heads=2))
    compiled = CompiledBlock(prints=True)
    model.kernels = dataclasses.replace(model.kernels, compiled=compiled)
    ids = torch.arange(8)[None]
    start = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert Cpu().has_room_for(lambda: model(ids, ids)[0].backward())
    assert capsys.readouterr().out == ""
    assert compiled.programs() == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == start


@pytest.mark.parametrize("share", range(1, 40))
def test_a_smaller_batch_is_the_same_update(share: int) -> None:
    for accum in (1, 3, 8):
        found = same_update(share, accum)
        assert all(n * micro_steps == share * accum for n, micro_steps in found)
        assert [n for n, _ in found] == [n for n in reversed(range(1, share)) if (share * accum) % n == 0]
        for most in range(share + 2):  # what trying finds is what trying all would
            best = max((batch for batch in found if batch[0] <= most), default=None)
            assert first_that_fits(found, lambda n, most=most: n <= most) == best


def test_a_device_that_says_what_a_program_needs_gets_an_estimate() -> None:
    """Of 16 GiB, weights and all that belongs to them take 4; 64 sequences take 48 beside them, so 12 hold 16."""
    shortage = Shortage("TPU v5 lite", 16 * GIB, 48 * GIB)
    advice = train_advice(shortage, TRAIN, 1, GIB // 4, lambda n: None)
    assert advice == (
        "--train-batch-size 64 does not fit; about 16 sequences per device do: --train-batch-size 16 "
        "--gradient-accum-step 32 is the same 512 sequences per update"
    )
    # Of 8 devices, which divide the state: 8 sequences on each, and 16 GiB hold (16 - 0.5) / 48 of them.
    advice = train_advice(shortage._replace(state_split=8), TRAIN, 8, GIB // 4, lambda n: None)
    assert "about 2 sequences per device do: --train-batch-size 16 --gradient-accum-step 32 is" in advice
    advice = train_advice(Shortage("", 4 * GIB, 48 * GIB), TRAIN, 1, GIB // 4, lambda n: None)
    assert "not even one sequence" in advice
    assert "--activation-checkpointing block" in advice


def test_a_device_that_can_try_tries() -> None:
    tries = []

    def fits(sequences: int) -> bool:
        tries.append(sequences)
        return sequences <= 24

    assert "; 16 sequences per device fit: --train-batch-size 32 --gradient-accum-step 16 is the same 512 " in (
        train_advice(Shortage("cuda:0"), TRAIN, 2, 0, fits)
    )
    assert len(tries) <= 4
    assert "not even one sequence per device fits" in train_advice(Shortage(""), TRAIN, 2, 0, lambda n: False)
    one = dataclasses.replace(TRAIN, train_batch_size=1)
    assert "not even one sequence per device fits" in train_advice(Shortage(""), one, 1, 0, lambda n: None)


def test_a_device_that_says_nothing_gets_half() -> None:
    advice = train_advice(Shortage("cpu"), TRAIN, 1, 0, lambda n: None)
    assert "--train-batch-size 32 --gradient-accum-step 16 is the same 512 sequences" in advice
    ramp = dataclasses.replace(TRAIN, batch_ramp=("512:0", "1024:9"))
    advice = train_advice(Shortage("cpu"), ramp, 1, 0, lambda n: None)
    assert advice == "--train-batch-size 64 does not fit; --train-batch-size 32 makes the same updates"


def test_advice_for_an_evaluation_names_its_own_flag() -> None:
    assert "--eval-batch-size 64 does not fit; with 32, or fewer" in eval_advice(TRAIN, 8, "validation")
    assert "with 24, or fewer" in eval_advice(dataclasses.replace(TRAIN, eval_batch_size=56), 8, "HellaSwag")
    assert "not even one" in eval_advice(dataclasses.replace(TRAIN, eval_batch_size=8), 8, "validation")
    assert "--sample-interval" in eval_advice(TRAIN, 1, "sampling")


@pytest.mark.parametrize(
    ("message", "figures"),
    [
        (TPU_REFUSES, (39.25, 15.75)),
        ("Allocation (size=26374832128) would exceed memory (size=16911433728) :: #allocation6", (24.563, 15.75)),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_a_tpus_compiler_gives_figures(message: str, figures: tuple[float, float] | None) -> None:
    found = compiler_figures(message)
    assert (found and [n / GIB for n in found]) == (figures and pytest.approx(list(figures), rel=1e-3))


def test_a_tpu_is_named_with_its_figures() -> None:
    memory = XlaMemory("TPU v5 lite")
    # torch_xla puts its own words before the compiler's.
    found = memory.shortage(RuntimeError(f"Error preparing computation: {TPU_REFUSES}"))
    assert found is not None
    assert found.place == "TPU v5 lite (15.75 GiB, of which the program needs 39.25)"
    advice = train_advice(found, dataclasses.replace(TRAIN, train_batch_size=8192), 8, 46_000_000, lambda n: None)
    assert "; about 393 sequences per device do: --train-batch-size 2048 --gradient-accum-step 32 is" in advice
    # XLA:CPU gives no figures.
    full = RuntimeError(
        "Error dispatching computation: Error preparing computation: Out of memory allocating 4000000000 bytes."
    )
    assert memory.shortage(full) == Shortage("TPU v5 lite")
    assert memory.shortage(RuntimeError("INVALID_ARGUMENT: shapes")) is None


def test_a_gpu_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=140 * GIB))
    memory = Cuda(0)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        found = memory.shortage(error)
        assert found is not None
        assert found.place == "cuda:0 (NVIDIA H200, 140 GiB)"
        assert found.needed is None
    assert memory.shortage(RuntimeError("CUDA error: an illegal memory access was encountered")) is None


class OutOfMemoryError(RuntimeError):
    """As torch's, which CUDA raises, is called."""


def test_errors_that_are_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    for error in (refused.value, MemoryError(), OutOfMemoryError(), OSError(12, "Cannot allocate memory")):
        assert is_out_of_memory(error)
    for other in (OSError(28, "No space left on device"), ValueError("std::bad_alloc"), RuntimeError("shapes")):
        assert not is_out_of_memory(other)


def test_one_line_tells_and_what_the_work_held_is_free() -> None:
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    held = []

    class Activations: ...

    def work() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        torch.empty(2**60)

    with (
        pytest.raises(RunFailed, match=r"out of memory on this machine in step 1: False"),
        explain_out_of_memory(runtime, "in step 1", lambda _: str(held[0]() is not None)),
    ):
        work()
    with pytest.raises(ZeroDivisionError), explain_out_of_memory(runtime, "in step 1", str):
        raise ZeroDivisionError


def test_on_a_cpu_it_is_one_line_with_a_batch_that_fits(data_flags: list[str], tmp_path: Path) -> None:
    """128 sequences fit into 0.85 GiB, 256 into 1.3, a little more or less each time: the limit is near neither."""
    flags = [
        *data_flags, *SMALL_RUN, "--d-model", "256", "--seq-length", "64", "--train-steps", "1", "--valid-steps", "1",
        "--eval-batch-size", "1", "--checkpoints-dir", tmp_path,
    ]  # fmt: skip
    result = run_limited(1, *flags, "--train-batch-size", 512, "--gradient-accum-step", 1)
    (line,) = result.stderr.strip().splitlines()
    assert result.returncode == 1, result.stderr
    found = re.fullmatch(
        r"run_pretrain.py: error: out of memory on this machine in step 1: --train-batch-size 512 does not fit; "
        r"(\d+) sequences? per device fit: (--train-batch-size \1 --gradient-accum-step (\d+)) is the same 512 sequences "
        r"per update",
        line,
    )
    assert found, line
    assert int(found[1]) * int(found[3]) == 512
    succeed(run_limited(1, *flags, *found[2].split()))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "0,1"])
def test_of_several_processes_one_tells_and_all_end(ranks: str, data_flags: list[str], tmp_path: Path) -> None:
    flags = [
        *data_flags, *SMALL_RUN, "--d-model", "256", "--seq-length", "64", "--train-steps", "1", "--valid-steps", "1",
        "--train-batch-size", "512", "--gradient-accum-step", "1", "--checkpoints-dir", tmp_path,
    ]  # fmt: skip
    result = torchrun(2, *flags, program="tests/workers/memory_worker.py", LIMITED=ranks, PYTHONPATH=str(ROOT))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert "out of memory on this machine in step 1: --train-batch-size 512 does not fit; " in line
    assert line.endswith(" is the same 512 sequences per update")


def test_an_evaluation_out_of_memory_names_its_batch(data_flags: list[str], trained: Path) -> None:
    flags = ["--do-test", "--from-checkpoint", trained, "--eval-batch-size", 2**20, "--valid-steps", 1]
    result = run_limited(1, *data_flags, *flags)
    (line,) = result.stderr.strip().splitlines()
    assert result.returncode == 1, line
    assert line.startswith(
        "run_pretrain.py: error: out of memory on this machine in validation: --eval-batch-size 1048576 "
    )


def test_a_run_that_may_be_ended_without_a_word_is_warned() -> None:
    model, train = ModelConfig(), dataclasses.replace(TRAIN, train_batch_size=8, gradient_accum_step=64)
    assert host_warning(model, train, 124_000_000, None, 1) is None
    assert host_warning(model, train, 124_000_000, 64 * GIB, 1) is None
    warning = host_warning(model, train, 124_000_000, 4 * GIB, 1)
    assert warning is not None
    assert "4.0 are free" in warning
    assert "--train-batch-size 4 --gradient-accum-step 128 is the same 512" in warning
    assert "choose a smaller model" in (host_warning(model, train, 124_000_000, GIB // 4, 1) or "")


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.slow),
        {"activation_checkpointing": "block"},
        {"loss_chunks": 4},
    ],
    ids=str,
)
def test_what_a_step_takes_is_never_overstated(options: dict) -> None:
    """Against torch's own record of what it allocates in one: the estimate is that or a little less."""
    train = TrainConfig(**{"train_batch_size": 8, "compile": False, **options})
    config = ModelConfig(vocab_size=1024, seq_length=128, d_model=128, num_layers=4, num_heads=2)
    model = GPT2(config)
    runtime = TorchRuntime(TorchConfig(), train)
    runtime.setup_model(model)
    ids = torch.zeros(8, 128, dtype=torch.int64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with runtime.autocast():
            loss = model(ids, ids)[0]
        loss.backward()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    measured = max(itertools.accumulate(changes))
    parameters = model.num_parameters()
    estimate = host_step_bytes(config, train, parameters, 8) - 4 * parameters
    assert 0.6 * measured < estimate < 1.05 * measured


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n"}, 8192),
        (
            {
                "proc/meminfo": "MemAvailable: 8 kB\n",
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "4096\n",
                "sys/fs/cgroup/a/memory.current": "3000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 500\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "3000\n",
                "sys/fs/cgroup/a/b/memory.stat": "inactive_file 500\n",
            },
            1596,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 8 kB\n",
                "proc/self/cgroup": "5:devices:/\n4:memory:/of/the/host\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "3000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 1000\n",
            },
            3000,
        ),
    ],
    ids=["unknown", "machine", "cgroup 2", "container, cgroup 1"],
)
def test_free_memory_is_the_least_of_machine_and_containers(
    files: dict[str, str], free: int | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    assert free_host_memory(tmp_path) == free
