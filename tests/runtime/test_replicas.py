"""Several XLA:CPU replicas, a process each: the numbers of torch's one process on the joined batch, and one end for all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL_RUN,
    alive,
    metrics,
    require_xla,
    run_here,
    run_xla,
    succeed,
    torchrun,
    training_losses,
    wait_for,
    write_split,
)
from safetensors.torch import load_file

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    """Of a run as scripts/tpu_report.py starts it, which also writes facts.json."""
    folder = tmp_path_factory.mktemp("two")
    program = f"-m gpt2xla.commands.measured_run {folder}/facts.json"
    succeed(run_xla(*data_flags, *SMALL_RUN, "--checkpoints-dir", folder, program=program, CPU_NUM_DEVICES="2"))
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    """Losses, gradient norms, validations and the final weights."""
    lines, expected = metrics(folder), metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for name, relative in (("loss", RELATIVE), ("grad_norm", 1e-4), ("valid_loss", RELATIVE), ("lr", 0)):
        values = [[line[name] for line in run if name in line] for run in (lines, expected)]
        assert values[0] == pytest.approx(values[1], rel=relative), name
    last = metrics(other)[-1]["step"]
    weights = [load_file(run / f"step-{last:08d}" / "model.safetensors") for run in (folder, other)]
    for name, tensor in weights[1].items():
        if name.endswith("attn.c_attn.bias"):
            # Softmax ignores a bias of the keys: its gradient is rounding alone, which Adam makes steps of.
            for weight in (weights[0][name], tensor):
                weight.view(3, -1)[1] = 0
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-3, atol=1e-5)


def test_two_replicas_equal_one_process_on_the_joined_batch(two: Path, trained: Path) -> None:
    assert_same_run(two, trained)


def test_a_measured_run_writes_down_what_it_ran_on_and_what_it_compiled(two: Path) -> None:
    facts = json.loads((two / "facts.json").read_text())
    lines = [line for line in metrics(two) if "loss" in line]
    assert (facts["type"], facts["devices"], facts["precision"]) == ("CPU", 2, "none")
    assert facts["kernels"] == "chunked attention, loss in 1 piece"
    assert len(facts["compile_seconds"]) == lines[-1]["compiles"]
    assert all(seconds > 0 for seconds in facts["compile_seconds"])
    shares = [
        line["mfu"] / line["tokens_per_second"] for line in lines
    ]  # FLOPs per token, of the peak that was measured
    assert shares == pytest.approx([shares[0]] * 20, rel=1e-6)
    assert facts["flops_per_token"] > 0
    assert facts["peak_flops"] > 0
    assert facts["memory"] is None, "XLA:CPU does not say"


@pytest.mark.slow
def test_four_replicas_with_the_sync_free_optimizer_equal_one_process(
    trained: Path, data_flags: list[str], tmp_path: Path
) -> None:
    flags = [*data_flags, *SMALL_RUN, "--use-syncfree-optim", "--checkpoints-dir", tmp_path]
    assert "4 x XLA:CPU" in succeed(run_xla(*flags, CPU_NUM_DEVICES="4"))
    assert_same_run(tmp_path, trained)


@pytest.mark.slow
def test_torchrun_starts_replicas_too(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    require_xla()
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path]
    text = succeed(torchrun(2, *flags, program="run_pretrain_xla.py", PJRT_DEVICE="CPU"))
    assert "2 x XLA:CPU" in text
    assert_same_run(tmp_path, trained)


def test_replicas_compile_three_graphs(two: Path) -> None:
    """Micro-steps, optimizer, validation: the first two at step 1, the third at the first validation, after step 10."""
    assert [line["compiles"] for line in metrics(two) if "compiles" in line] == [2] * 10 + [3] * 10


@pytest.mark.slow
def test_a_run_moves_between_replicas_one_replica_and_torch(
    two: Path, trained: Path, data_flags: list[str], tmp_path: Path
) -> None:
    expected = training_losses(trained)[10:]
    flags = [*data_flags, *SMALL_RUN]
    from_two, to_two = two / "step-00000010", trained / "step-00000010"
    succeed(run_xla(*flags, "--from-checkpoint", from_two, "--checkpoints-dir", tmp_path / "one"))
    succeed(run_here("run_pretrain.py", *flags, "--from-checkpoint", from_two, "--checkpoints-dir", tmp_path / "torch"))
    flags += ["--from-checkpoint", to_two, "--checkpoints-dir", tmp_path / "two"]
    succeed(run_xla(*flags, CPU_NUM_DEVICES="2"))
    for name in ("one", "torch", "two"):
        assert training_losses(tmp_path / name) == pytest.approx(expected, rel=RELATIVE), name


@pytest.mark.slow
def test_resumed_replicas_with_dropout_are_bit_identical(data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--dropout", "0.2", "--shuffle"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    succeed(run_xla(*flags, "--checkpoints-dir", unbroken, CPU_NUM_DEVICES="2"))
    succeed(run_xla(*flags, "--checkpoints-dir", broken, "--train-steps", 10, CPU_NUM_DEVICES="2"))
    succeed(run_xla(*flags, "--checkpoints-dir", broken, CPU_NUM_DEVICES="2"))
    assert training_losses(broken) == training_losses(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("replica", [0, 1])
def test_an_error_that_only_one_replica_meets_ends_all_with_its_message_and_code(replica: int, tmp_path: Path) -> None:
    """An id that no sample finds, in a window of that replica, in step 26; the other waits for it in a collective."""
    tokens = np.zeros(2_000_000, dtype=np.uint16)
    tokens[16 * (312 + 2 * replica) + 5] = 96
    write_split(tmp_path / "train", tokens, shards=1)
    write_split(tmp_path / "test", tokens[:200], shards=1)
    flags = ["--train-dir", tmp_path / "train", "--valid-dir", tmp_path / "test", *SMALL_RUN, "--vocab-size", 90]
    flags += ["--train-steps", 40, "--checkpoints-dir", tmp_path / "c"]
    result = run_xla(*flags, CPU_NUM_DEVICES="2")
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error:") == 1, result.stderr
    assert "000.npy: id 96 does not fit --vocab-size 90" in result.stderr


@pytest.mark.slow
def test_a_diverged_run_of_replicas_fails_once(data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--learning-rate", 1e30, "--checkpoints-dir", tmp_path]
    result = run_xla(*flags, CPU_NUM_DEVICES="2")
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("the run has diverged") == 1, result.stderr


def children(process: subprocess.Popen) -> list[int]:
    """Its replicas, by rank."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [pid for pid in map(int, text.split()) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize(
    ("target", "number", "code"),
    [
        pytest.param("replica 0", signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param("replica 1", signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("launcher", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("replica 1", signal.SIGTERM, 143, marks=pytest.mark.slow),
        ("all", signal.SIGINT, 130),
    ],
)
def test_the_end_of_one_is_the_end_of_all(
    target: str,
    number: signal.Signals,
    code: int,
    data_flags: list[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    require_xla()
    flags = [*data_flags, *SMALL_RUN, "--train-steps", "1000000", "--checkpoints-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "run_pretrain_xla.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}, text=True,
        start_new_session=True,
    )  # fmt: skip
    request.addfinalizer(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
    wait_for((tmp_path / "step-00000010").exists, 240)
    replicas = children(process)
    assert len(replicas) == 2
    if target == "all":  # Ctrl-C on a terminal
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if target == "launcher" else replicas[int(target[-1])], number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    wait_for(lambda: not any(map(alive, replicas)), 30)
    assert "Traceback" not in errors, errors
    assert "leaked" not in errors or number == signal.SIGKILL, errors
    if number != signal.SIGKILL:
        assert "stopped by" in printed, "the main process was ended before it had printed all"
        assert printed.rstrip().endswith(f"step-{metrics(tmp_path)[-1]['step']:08d}")
    elif target.startswith("replica"):
        assert f"{target} was ended by SIGKILL" in errors
