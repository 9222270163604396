"""Runs a program in a process whose imports are done, which take most of a small run's time otherwise.

A server for each kind of program imports once, and forks a process for each one that it is asked to run. Such a process is
like a new one but for what its imports did: they use no device, start no thread and draw no random number."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

_COMMON = ("transformers", "gpt2xla.training.pretrain")
IMPORTS = {
    "torch": (*_COMMON, "gpt2xla.commands.train", "gpt2xla.runtime.torch.runtime"),
    "xla": (*_COMMON, "gpt2xla.commands.train_xla", "gpt2xla.runtime.xla.runtime"),
}
# What the imports do not read. In another environment than the server's a program starts as ever.
_FREE = {"PJRT_DEVICE", "CPU_NUM_DEVICES", "PYTEST_CURRENT_TEST"}


def run_warm(
    kind: str, words: list[str], folder: Path, environment: dict[str, str], seconds: float
) -> subprocess.CompletedProcess[str] | None:
    """Run a Python program, or `-m` and a module, with its arguments in `folder`. Return None if that cannot be done here.

    Raises TimeoutExpired."""
    server = _server(kind)
    is_program = words[0] == "-m" or words[0].endswith(".py")
    if not is_program or _fixed(environment) != server.environment or not server.turn.acquire(blocking=False):
        return None
    try:
        return server.run(words, folder, environment, seconds)
    finally:
        server.turn.release()


class _Server:
    def __init__(self, kind: str) -> None:
        self.environment, self.turn = _fixed(os.environ), threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, __file__, *IMPORTS[kind]], env=os.environ | ({"PJRT_DEVICE": "CPU"} if kind == "xla" else {}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(
        self, words: list[str], folder: Path, environment: dict[str, str], seconds: float
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as place:
            files = [Path(place, name) for name in ("output", "errors")]
            request = {"words": words, "folder": folder, "environment": environment, "files": files}
            print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                os.killpg(self.process.pid, signal.SIGKILL)
                _server.cache_clear()
                raise subprocess.TimeoutExpired(words, seconds)
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(words, code, *(file.read_text() for file in files))


_server = cache(_Server)


def _fixed(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _FREE}


def _next_program() -> dict[str, Any]:
    """Return, in a process of its own, the program that it is to become."""
    for line in sys.stdin:
        if not (pid := os.fork()):
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)  # the tests have ended


def _become(words: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    for number, (file, mode) in enumerate([(os.devnull, os.O_RDONLY), *((f, os.O_WRONLY | os.O_CREAT) for f in files)]):
        os.dup2(os.open(file, mode), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if words[0] == "-m":
        sys.path[0], sys.argv = folder, words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(folder, words[0]).parent), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    _become(**_next_program())
