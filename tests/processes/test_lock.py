"""A lock gives a folder to one process at a time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2xla.errors import InputError
from gpt2xla.processes.locks import locked, refuse_if_locked

_HOLD = """
import pathlib, sys, time
from gpt2xla.processes.locks import locked
with locked(pathlib.Path(sys.argv[1]), "--checkpoints-dir c"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_names_the_first_and_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(file)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(InputError) as error, locked(file, "--checkpoints-dir c"):
            pass
        with pytest.raises(InputError, match=f"process {first.pid} on"):
            refuse_if_locked(file, "--checkpoints-dir c")
        assert str(error.value).startswith("--checkpoints-dir c: ")
        assert f"process {first.pid} on {socket.gethostname()}" in str(error.value)
        first.send_signal(signal.SIGKILL)
        first.wait()
    refuse_if_locked(file, "--checkpoints-dir c")
    with locked(file, "--checkpoints-dir c"):
        assert f"process {os.getpid()} " in file.read_text()
