"""How a program ends when the reader of its output has exited, such as `| head`; and processes that cannot meet."""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL_RUN, prepare_documents
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from gpt2xla.config import TorchConfig
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.logs.console import say
from gpt2xla.processes.exits import exit_code, report
from gpt2xla.processes.quiet import silent
from gpt2xla.runtime.torch import process_group
from gpt2xla.runtime.torch.process_group import Place, find_place, join


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes standard output or standard error a pipe without a reader."""
    pipes = []

    def break_streams(*names: str) -> None:
        for name in names:
            reader, writer = os.pipe()
            os.close(reader)
            pipes.append(os.fdopen(writer, "w"))
            monkeypatch.setattr(sys, name, pipes[-1])

    yield break_streams
    for pipe in pipes:
        pipe.close()  # raises if something is still to be written to the broken pipe


def write(stream: str, text: str = "x", times: int = 1) -> Callable[[], None]:
    return lambda: [print(text, file=getattr(sys, stream), flush=True) for _ in range(times)] and None


def refuse() -> None:
    raise InputError("wrong")


def leave() -> None:
    print("help")
    sys.exit(0)


@pytest.mark.parametrize(
    ("streams", "main", "code"),
    [
        (["stdout"], write("stdout", times=3), 141),
        (["stdout"], lambda: print("x" * 100_000), 141),
        (["stdout"], lambda: print("kept until the end"), 141),
        (["stdout"], leave, 141),
        (["stdout"], lambda: None, 0),
        (["stderr"], write("stderr"), 141),
        (["stdout", "stderr"], write("stderr"), 141),
        (["stdout", "stderr"], refuse, 2),
        (["stdout"], refuse, 2),
    ],
)
def test_a_closed_pipe_ends_silently_with_a_code(
    broken: Callable[..., None], capfd: pytest.CaptureFixture, streams: list[str], main: Callable[[], None], code: int
) -> None:
    broken(*streams)
    assert exit_code(main) == code
    sys.stdout.flush()
    if "stderr" in streams:
        assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_standard_output_on_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    with open("/dev/full", "w") as full:  # closing it raises if something is still to be written
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code(lambda: print("kept until the end")) == 1
    error = capfd.readouterr().err
    assert "the disk is full, or your quota on it" in error
    assert error.count("\n") == 1


def test_an_error_is_one_line_whatever_a_files_name_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(InputError("a\n\r\x85\u2028\x1b[2J.npy: not ünïcode")) == 2
    assert capsys.readouterr().err.endswith(": error: a\\n\\r\\x85\\u2028\\x1b[2J.npy: not ünïcode\n")


def test_standard_streams_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python then has None for them."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert exit_code(lambda: say("x") or say("y", error=True)) == 0
    assert exit_code(refuse) == 2
    sys.stdout.close()
    sys.stderr.close()


def test_another_broken_connection_is_no_closed_pipe(broken: Callable[..., None]) -> None:
    def main() -> None:
        raise BrokenPipeError("a server's")

    with pytest.raises(BrokenPipeError):
        exit_code(main)


@pytest.mark.parametrize("streams", [["stdout"], ["stdout", "stderr"]])
def test_programs_end_with_their_reader(
    streams: list[str], broken: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2xla.cli import parse_run
    from gpt2xla.runtime.torch.runtime import TorchRuntime
    from gpt2xla.training.pretrain import pretrain

    data = prepare_documents(tmp_path / "data")
    broken(*streams)
    flags = ["--train-dir", data / "train", "--valid-dir", data / "test", "--checkpoints-dir", tmp_path / "c"]
    config, options = parse_run(TorchConfig, [*map(str, flags), *SMALL_RUN, "--vocab-size", "257"])
    assert exit_code(lambda: pretrain(config, lambda train: TorchRuntime(options, train))) == 141
    broken(*streams)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import inspect_data

    monkeypatch.setattr(sys, "argv", ["inspect_data.py", str(data)])
    assert exit_code(inspect_data.main) == 141


WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "9",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": ""}, None),
        ({"MASTER_ADDR": "h", "MASTER_PORT": "9"}, None),
        (WHOLE, Place(1, 2, 1, 2)),
        ({k: v for k, v in WHOLE.items() if not k.startswith("LOCAL")}, Place(1, 2, None, 1)),
    ],
)
def test_a_launchers_variables_are_understood(environment: dict[str, str], place: Place | None) -> None:
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"RANK": "0"}, ["RANK=0 is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"]),
        (WHOLE | {"MASTER_ADDR": ""}, ["RANK=1 is set, but not MASTER_ADDR;"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 is set, but not RANK"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1 is set, but not RANK"]),
        (WHOLE | {"RANK": "x"}, ["RANK=x"]),
        (WHOLE | {"RANK": "-1"}, ["RANK=-1"]),
        (WHOLE | {"RANK": "2"}, ["RANK=2, with WORLD_SIZE=2"]),
        (WHOLE | {"LOCAL_RANK": "2"}, ["LOCAL_RANK=2, with LOCAL_WORLD_SIZE=2"]),
        (WHOLE | {"WORLD_SIZE": "two"}, ["WORLD_SIZE=two"]),
        (WHOLE | {"MASTER_PORT": "70000"}, ["MASTER_PORT=70000", "65535"]),
    ],
)
def test_variables_that_do_not_fit_are_named(environment: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        find_place(environment)
    assert [part for part in parts if part not in str(error.value)] == [], error.value


def meet(monkeypatch: pytest.MonkeyPatch, place: Place, port: int, host: str = "localhost", minutes: float = 0) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    for name, value in {"RANK": place.rank, "WORLD_SIZE": place.world_size, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(process_group, "MINUTES_TO_MEET", minutes)
    monkeypatch.setattr(process_group, "SECONDS_OF_SILENCE", 0.1)
    join(place, "gloo", torch.device("cpu"))


@pytest.fixture
def listener() -> Iterator[Any]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("localhost", 0)) as server:
        yield server


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Wait for the threads that still try to meet: torch warns on standard error when they give up."""
    yield
    for thread in threading.enumerate():
        if thread.name == "rendezvous":
            thread.join()


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch, listener: Any) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(InputError, match=f"MASTER_PORT={port}: address already in use; choose another"):
        meet(monkeypatch, Place(0, 2, 0, 2), port)


@pytest.mark.parametrize(("host", "why"), [("localhost", "refused"), ("nowhere.invalid", "no host of that name")])
def test_a_first_process_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, host: str, why: str) -> None:
    with pytest.raises(InputError, match=f"MASTER_ADDR={host} MASTER_PORT=.*{why}"):
        meet(monkeypatch, Place(1, 2, 1, 2), free_port(), host)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_come_are_one_line_after_a_notice(
    monkeypatch: pytest.MonkeyPatch, no_thread_left: None, listener: Any, capfd: pytest.CaptureFixture, rank: int
) -> None:
    """The first process waits in vain; another one connects to a program that never answers."""
    port = listener.getsockname()[1] if rank else free_port()
    with pytest.raises(RunFailed, match=f"rank {rank}: the 2 processes have not all met at MASTER_ADDR=localhost"):
        meet(monkeypatch, Place(rank, 2, rank, 2), port, minutes=0.01)
    assert capfd.readouterr().err == f"rank {rank}: waiting for the other processes at localhost:{port} ...\n"
    assert not dist.is_initialized()


def test_torchrun_is_told_and_remarks_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "0" / "0" / "error.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def main() -> None:
        logger = logging.getLogger("torch.utils.cpp_extension")
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
        logger.warning("the compiler is too old")
        with silent(1, 2) as say_still:
            os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks\n")
            say_still("waiting")
        raise InputError("it is wrong")

    assert exit_code(main) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("waiting\n")
    assert printed.err.endswith(": error: it is wrong\n")
    assert caplog.messages == ["the compiler is too old"]
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.message["message"].endswith(": error: it is wrong")


def test_what_goes_wrong_while_python_takes_itself_apart_does_not_change_the_exit_code() -> None:
    program = """
import atexit, os, sys
from gpt2xla.processes.exits import run_and_exit

class Abort:
    def __del__(self):
        os.abort()

def main():
    global kept
    kept = Abort()
    atexit.register(print, "registered with atexit")
    print("done")

run_and_exit(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "done\nregistered with atexit\n"), ended.stderr
