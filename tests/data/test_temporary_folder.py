"""Folders for passing files are removed when their process is dead, and only then."""

import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from gpt2xla.data.preparation.temporary_folder import temporary_folder

PROGRAM = """
import sys, time
from gpt2xla.data.preparation.temporary_folder import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    processes, folders = [], []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        folders.append(Path(process.stdout.readline().strip()))
        (folders[-1] / "part.parquet").write_text("x")
        processes.append(process)
    (tmp_path / "gpt2xla-hub-of-somebody").write_text("a file")
    try:
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        with temporary_folder(str(tmp_path)) as mine:
            assert not folders[0].exists()
            assert (folders[1] / "part.parquet").exists()
            assert mine.is_dir()
            with temporary_folder(str(tmp_path)) as another:
                assert another != mine
            assert not another.exists()
            assert mine.is_dir(), "its process is this one"
        assert not mine.exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
