"""The end of torch's process group."""

import socket

from conftest import ROOT, run, succeed


def test_a_model_goes_while_a_thread_of_the_group_still_has_a_tensor() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    done = run("tests/workers/late_worker.py", PYTHONPATH=str(ROOT), **meeting)
    assert succeed(done) == "the model is gone\n", done.stderr
