"""Two processes of torchrun on one model, in each of the three ways: what they reduce and hold, that they train as one
process does, and that checkpoints move between them all."""

import ctypes
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SMALL_RUN,
    alive,
    metrics,
    prepare_documents,
    run,
    run_here,
    run_xla,
    succeed,
    told,
    torchrun,
    training_losses,
    wait_for,
)
from safetensors.torch import load_file

from gpt2xla.checkpoint.run_folder import list_checkpoints
from gpt2xla.checkpoint.start import find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import ModelConfig, OptimConfig, TorchConfig, TrainConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.torch.compile import CompiledBlock
from gpt2xla.runtime.torch.runtime import TorchRuntime

LAYOUTS: dict[str, list[str]] = {"ddp": [], "zero1": ["--zero1"], "fsdp": ["--fsdp"]}
SPLIT = {name: LAYOUTS[name] for name in ("zero1", "fsdp")}
RELATIVE = {"ddp": 1e-6, "zero1": 1e-6, "fsdp": 1e-5}
LAYERS = 2


@pytest.fixture(scope="module")
def flags(data_flags: list[str]) -> list[str]:
    # torch's own attention rounds a sequence alike in batches of any size, which leaves the reduction to be compared.
    return [*data_flags, *SMALL_RUN, "--warmup-steps", "4", "--gradient-accum-step", "4", "--attention", "sdpa"]


@pytest.fixture(scope="module")
def runs(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints folders of the same 20 steps: "one" of a single process, the others of two, with their counts beside."""
    root = tmp_path_factory.mktemp("runs")
    succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", root / "one"))
    for name, layout in LAYOUTS.items():
        folder = root / name
        folder.mkdir()
        succeed(
            torchrun(2, folder, *flags, *layout, "--checkpoints-dir", folder, program="tests/workers/torch_worker.py")
        )
    return {name: root / name for name in ("one", *LAYOUTS)}


def counts(folder: Path) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "step-00000020" / "model.safetensors")


def optimizer_of(folder: Path) -> dict:
    training = find_start(parse_run(TorchConfig, ["--checkpoints-dir", str(folder)])[0]).training
    assert training is not None
    return training["optimizer"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_train_as_one(runs: dict[str, Path], name: str) -> None:
    lines, expected = metrics(runs[name]), metrics(runs["one"])
    for key in ("loss", "grad_norm", "valid_loss"):
        values = [[line[key] for line in lines if key in line] for lines in (lines, expected)]
        assert len(values[0]) == (2 if key == "valid_loss" else 20)
        assert values[0] == pytest.approx(values[1], rel=RELATIVE[name]), key
    ours, theirs = weights_of(runs[name]), weights_of(runs["one"])
    for key, tensor in theirs.items():
        if key.endswith("attn.c_attn.bias"):
            # Softmax ignores a bias of the keys: its gradient is rounding alone, which Adam makes steps of.
            for weight in (ours[key], tensor):
                weight.view(3, -1)[1] = 0
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp", "zero1"])
def test_ddp_reduces_each_gradient_once_per_update(runs: dict[str, Path], name: str) -> None:
    """Of four micro-steps."""
    parameters = sum(tensor.numel() for tensor in weights_of(runs["one"]).values())
    for process in counts(runs[name]):
        assert [sum(update) for update in process["updates"]] == [parameters] * 20


def test_fsdp_reduces_each_block_once_per_update(runs: dict[str, Path]) -> None:
    """Blocks, and the root with what belongs to none; wte's 97 rows and nothing else are filled up to an even number."""
    weights = weights_of(runs["one"])
    sent = sum(tensor.numel() for tensor in weights.values()) + weights["transformer.wte.weight"].shape[1]
    for process in counts(runs["fsdp"]):
        assert [(len(update), sum(update)) for update in process["updates"]] == [(LAYERS + 1, sent)] * 20


def test_each_process_holds_its_part(runs: dict[str, Path]) -> None:
    parameters = sum(tensor.numel() for tensor in weights_of(runs["one"]).values())
    row = weights_of(runs["one"])["transformer.wte.weight"].shape[1]
    ddp, zero1, fsdp = (counts(runs[name]) for name in LAYOUTS)
    assert [process["moments"] for process in ddp] == [2 * parameters] * 2
    # Whole parameters go to one process or the other: the halves are equal but for a small one.
    assert sum(process["moments"] for process in zero1) == 2 * parameters
    assert all(process["moments"] == pytest.approx(parameters, rel=0.01) for process in zero1)
    assert [process["weights"] for process in fsdp] == [(parameters + row) // 2, (parameters - row) // 2]
    assert [process["moments"] for process in fsdp] == [parameters + row, parameters - row]


def test_zero1_is_ddp_to_the_last_bit_and_so_is_its_checkpoint(runs: dict[str, Path]) -> None:
    """Adam updates each number for itself: who does it does not matter."""
    assert training_losses(runs["zero1"]) == training_losses(runs["ddp"])
    ours, theirs = weights_of(runs["zero1"]), weights_of(runs["ddp"])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    files = [sorted(file.name for file in (runs[n] / "step-00000020").iterdir()) for n in ("one", *LAYOUTS)]
    assert files == files[:1] * 4
    ours, theirs = optimizer_of(runs["zero1"]), optimizer_of(runs["ddp"])
    assert ours["step"] == theirs["step"] == 20
    for key in ("exp_avg", "exp_avg_sq"):
        assert ours[key].keys() == theirs[key].keys()
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in theirs[key])


@pytest.mark.parametrize("name", SPLIT)
def test_its_checkpoint_resumes_without_it(runs: dict[str, Path], name: str, flags: list[str], tmp_path: Path) -> None:
    more = ["--from-checkpoint", runs[name] / "step-00000010", "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *flags, *more))
    assert training_losses(tmp_path) == pytest.approx(training_losses(runs["one"])[10:], rel=RELATIVE[name])


@pytest.mark.parametrize("name", [pytest.param("zero1", marks=pytest.mark.slow), "fsdp"])
def test_a_checkpoint_of_one_process_goes_on_split(
    runs: dict[str, Path], name: str, flags: list[str], tmp_path: Path
) -> None:
    more = ["--from-checkpoint", runs["one"] / "step-00000010", "--checkpoints-dir", tmp_path]
    text = succeed(torchrun(2, *flags, *LAYOUTS[name], *more))
    assert "2 x CPU, 1 thread each" in text
    assert "optimizer split)" in text
    assert training_losses(tmp_path) == pytest.approx(training_losses(runs["one"])[10:], rel=RELATIVE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_on_another_number_of_processes(runs: dict[str, Path], name: str, flags: list[str], tmp_path: Path) -> None:
    """Four: more than wpe's and the biases' lengths allow evenly, and less than the tensors."""
    more = ["--from-checkpoint", runs[name] / "step-00000010", "--checkpoints-dir", tmp_path]
    succeed(torchrun(4, *flags, *LAYOUTS[name], *more))
    assert training_losses(tmp_path) == pytest.approx(training_losses(runs["one"])[10:], rel=1e-5)


@pytest.mark.slow
def test_an_fsdp_checkpoint_goes_on_on_xla(runs: dict[str, Path], flags: list[str], tmp_path: Path) -> None:
    more = ["--from-checkpoint", runs["fsdp"] / "step-00000010", "--checkpoints-dir", tmp_path]
    succeed(run_xla(*flags, *more))
    assert training_losses(tmp_path) == pytest.approx(training_losses(runs["one"])[10:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_a_resumed_run_is_bit_identical(runs: dict[str, Path], name: str, flags: list[str], tmp_path: Path) -> None:
    more = ["--from-checkpoint", runs[name] / "step-00000010", "--checkpoints-dir", tmp_path]
    succeed(torchrun(2, *flags, *LAYOUTS[name], *more))
    assert training_losses(tmp_path) == training_losses(runs[name])[10:]
    ours, theirs = weights_of(tmp_path), weights_of(runs[name])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def overflowing(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Flags of a run in fp16 whose scale begins at 2^30, and the checkpoints folder of two processes with plain DDP."""
    folder = tmp_path_factory.mktemp("overflowing")
    flags = [*flags, "--mixed-precision", "fp16", "--valid-interval", "0"]
    succeed(torchrun(2, "torch", *flags, "--checkpoints-dir", folder, program="tests/workers/overflow_worker.py"))
    return flags, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_overflowing_updates_of_fp16_are_skipped(
    overflowing: tuple[list[str], Path], name: str, tmp_path: Path
) -> None:
    """All skip the updates that plain DDP skips, and end with its scale and step count."""
    flags, plain = overflowing
    more = [*flags, *LAYOUTS[name], "--checkpoints-dir", tmp_path]
    succeed(torchrun(2, "torch", *more, program="tests/workers/overflow_worker.py"))
    skipped, expected = (
        [line["grad_norm"] is None for line in metrics(f) if "loss" in line] for f in (tmp_path, plain)
    )
    assert skipped == expected
    assert 3 < skipped.count(False) < 20
    ends = [torch.load(f / "step-00000020" / "training_state.pt", weights_only=True) for f in (tmp_path, plain)]
    assert ends[0]["runtime"] == ends[1]["runtime"]
    assert ends[0]["optimizer"]["step"] == ends[1]["optimizer"]["step"] == skipped.count(False)


@pytest.fixture
def launched_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launcher's only process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for variable, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(variable, str(value))


@pytest.mark.usefixtures("launched_alone")
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_update_is_made_with_a_finite_loss_and_at_the_given_rate(name: str, tmp_path: Path) -> None:
    """And else changes neither weights nor Adam's state."""
    runtime = TorchRuntime(TorchConfig(zero1=name == "zero1", fsdp=name == "fsdp"), TrainConfig())
    model = GPT2(ModelConfig(vocab_size=31, seq_length=8, d_model=16, num_layers=2, num_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    trained = runtime.setup_model(model)
    optimizer = runtime.build_optimizer(model, OptimConfig(learning_rate=0.01), None)
    ids = torch.arange(8)[None]

    def change(loss: float, rate: float) -> tuple[float, float]:
        """Of all weights, and how many updates Adam has counted."""
        before, _ = runtime.snapshot(model, optimizer, tmp_path)
        runtime.backward(trained(ids, ids)[0])
        runtime.optimizer_step(model, optimizer, torch.tensor(loss), rate=rate, max_grad_norm=1.0)
        after, state = runtime.snapshot(model, optimizer, tmp_path)
        return max((after[n] - before[n]).abs().max().item() for n in before), state["optimizer"]["step"]

    try:
        assert change(math.nan, 0.01) == (0, 0)
        assert change(1.0, 0.01) == (pytest.approx(0.01, rel=0.05), 1), "Adam's first step is the rate, and some decay"
        assert change(math.inf, 0.01) == (0, 1)
        assert change(1.0, 0.0) == (0, 2)
    finally:
        runtime.close()


@pytest.mark.usefixtures("launched_alone")
def test_fsdp_gathers_matrices_in_16_bits_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of two micro-steps are those of the model that is not split. All else is gathered in fp32."""
    shape = ModelConfig(vocab_size=31, seq_length=8, d_model=16, num_layers=2, num_heads=2)
    train, ids = TrainConfig(mixed_precision="bf16"), torch.arange(16).view(2, 1, 8)
    gathered: dict[str, torch.dtype] = {}

    def trained(options: TorchConfig) -> GPT2:
        runtime = TorchRuntime(options, train)
        model = GPT2(shape)
        model.init_weights(torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in model.parameters():  # no layer norm's weights are exactly 1
                parameter.add_(0.001 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        parallel_model = runtime.setup_model(model)
        model.h[0].mlp.register_forward_hook(
            lambda *_: gathered.update((name, p.dtype) for name, p in model.h[0].named_parameters())
        )
        for micro_step in range(2):
            with runtime.accumulate(parallel_model, sync=micro_step == 1):
                with runtime.autocast():
                    loss, _ = parallel_model(ids[micro_step], ids[micro_step])
                runtime.backward(loss)
        runtime.close()
        return model

    split = trained(TorchConfig(fsdp=True))
    assert len(gathered) == 4 * 2 + 2 * 2
    for name, dtype in gathered.items():
        assert dtype == (torch.bfloat16 if "ln_" not in name and name.endswith("weight") else torch.float32), name
    monkeypatch.delenv("RANK")
    plain = trained(TorchConfig())
    for name, parameter in plain.named_parameters():
        assert torch.equal(split.get_parameter(name).grad.to_local(), parameter.grad), name  # type: ignore[union-attr]


@pytest.mark.usefixtures("launched_alone")
def test_ddp_does_not_cut_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo would, where the parts of one block fill a bucket."""
    programs = []

    def count(program: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        programs.append(program)
        return program

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_with(function, backend=count))
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    model = GPT2(ModelConfig(vocab_size=31, seq_length=8, d_model=256, num_layers=2, num_heads=2))
    model.kernels = dataclasses.replace(model.kernels, compiled=CompiledBlock(prints=False))
    ids = torch.arange(8)[None]
    try:
        torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)(ids, ids)[0].backward()
        assert len(programs) == 1
    finally:
        runtime.close()


@pytest.fixture
def adopts() -> Iterator[None]:
    """Let this process inherit the processes whose parent ends, so that it learns their exit codes."""
    set_option, subreaper = ctypes.CDLL(None).prctl, 36
    set_option(subreaper, 1)
    yield
    set_option(subreaper, 0)


@pytest.mark.parametrize("target", ["torchrun", pytest.param("worker", marks=pytest.mark.slow)])
def test_its_workers_stop_with_a_checkpoint_and_without_a_report(
    target: str, adopts: None, data_flags: list[str], tmp_path: Path
) -> None:
    """Where torchrun is killed, and where one of its workers gets a signal, after which it must not start them again."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    launcher += ["run_pretrain.py", *data_flags]
    flags = [*SMALL_RUN, "--train-steps", "1000000", "--checkpoints-dir", str(tmp_path)]
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen([sys.executable, *launcher, *flags], cwd=ROOT, stdout=printed, stderr=printed)
    wait_for(lambda: list_checkpoints(tmp_path))
    workers = [*map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]
    assert len(workers) == 2
    if target == "torchrun":
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(alive, workers)))
        assert [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers] == [143] * 2
    else:
        os.kill(workers[1], signal.SIGTERM)
        assert process.wait(60) == 0
    text = (tmp_path / "printed").read_text()
    assert text.count(f"stopped by {'the end of torchrun' if target == 'torchrun' else 'SIGTERM'} after step") == 1
    assert "Traceback" not in text
    assert text.rstrip().endswith(list_checkpoints(tmp_path)[-1].name)


def two_processes(*arguments: tuple[object, ...]) -> list[subprocess.Popen[str]]:
    """Start waiting_worker.py twice as the processes of a run, without a launcher that would end them, and wait for both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    started = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "workers" / "waiting_worker.py", *map(str, own)],
            env=here | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, own in enumerate(arguments)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in started if process.stdout] == ["here\n"] * 2
    return started


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_process_that_waits_in_c_ends_after_another_has() -> None:
    """As one does that waits for a collective of NCCL's."""
    first, second = two_processes((0, "yes"), (0, "yes"))
    second.kill()
    assert first.wait(10) == 1
    assert first.communicate()[1] == (
        "waiting_worker.py: error: rank 1 exited early and stopped the run; rerun the same command to resume\n"
    )
    second.communicate()


def test_a_process_that_is_done_waits_for_the_others() -> None:
    for process in two_processes((0, "no"), (2, "no")):
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0


@pytest.mark.slow
def test_fsdp_evaluates_and_writes_before_and_between_its_steps(tmp_path: Path) -> None:
    """Validation, HellaSwag and samples call other methods of the model than training does: as one process, and also where
    they come first, after a resume of a run that was stopped in an evaluation."""
    data, items = prepare_documents(tmp_path / "data"), tmp_path / "items.jsonl"
    endings = ["one thing.", "another thing.", "a third.", "a fourth one."]
    item = {"activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "then he", "endings": endings, "label": 1}
    items.write_text("".join(json.dumps(item | {"ctx_a": f"Man {n} cooks."}) + "\n" for n in range(6)))
    flags = ["--train-dir", data / "train", "--valid-dir", data / "test", *SMALL_RUN, "--vocab-size", "257"]
    flags += ["--seq-length", "64", "--train-steps", "4", "--valid-interval", "2", "--sample-interval", "2"]
    flags += ["--hellaswag-interval", "2", "--hellaswag-data", items]
    succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", tmp_path / "one"))
    succeed(torchrun(2, *flags, "--fsdp", "--activation-checkpointing", "block", "--checkpoints-dir", tmp_path / "two"))
    lines, expected = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for key in ("loss", "valid_loss", "hellaswag_acc"):
        values = [[line[key] for line in lines if key in line] for lines in (lines, expected)]
        assert values[0], key
        assert values[0] == pytest.approx(values[1], rel=1e-5), key
    samples = [[line["sample"] for line in lines if "sample" in line] for lines in (lines, expected)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 2
    tested = [
        *flags[:4],
        "--do-test",
        "--from-checkpoint",
        tmp_path / "two",
        "--eval-batch-size",
        "4",
        "--valid-steps",
        "3",
    ]
    texts = [succeed(run("run_pretrain.py", *tested)), succeed(torchrun(2, *tested, "--fsdp"))]
    assert texts[0].split("loss ")[1] == texts[1].split("loss ")[1]


@pytest.mark.parametrize(
    ("wrong", "processes", "says"),
    [
        (["--zero1", "--fsdp"], 2, "--zero1 and --fsdp: --fsdp splits Adam's state, too; leave --zero1 out"),
        (["--zero1"], 1, "--zero1 needs several processes; start them with torchrun, or leave it out"),
        (["--fsdp"], 1, "--fsdp needs several processes; start them with torchrun, or leave it out"),
    ],
)
def test_what_cannot_work_is_one_line(
    wrong: list[str], processes: int, says: str, flags: list[str], tmp_path: Path
) -> None:
    more = [*flags, *wrong, "--checkpoints-dir", tmp_path / "c"]
    result = torchrun(2, *more) if processes == 2 else run("run_pretrain.py", *more)
    assert result.returncode == 2 or processes == 2
    assert told(result, says) == 1, result.stderr
    assert not (tmp_path / "c").exists()


def threads_of(processes: int, **environment: str) -> int:
    """What torch uses in the first of `processes` that torchrun starts, with OMP_NUM_THREADS as given or not at all."""
    program = ROOT / "tests" / "workers" / "threads_worker.py"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", program]
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(words, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_processes_share_the_cores_unless_the_user_has_chosen() -> None:
    """The worker believes in 8 cores, of which it may use 6."""
    assert threads_of(2) == 3
    assert threads_of(2, OMP_NUM_THREADS="1") == 1
