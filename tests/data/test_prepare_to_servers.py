"""Preparing to real object servers, which are busy, lose answers and list late, by processes that are killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run, succeed
from data.documents import documents, hashes
from object_server import object_server


@pytest.mark.parametrize("kind", ["s3", "gs"])
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_disturbed_it_ends_with_the_same_bytes(kind: str, kills: int, tmp_path: Path) -> None:
    """Killed before or after any of its requests that change something, with an empty disk after each. In between, the
    server is busy, loses answers, lists late, and does not know the credentials any more."""
    pq.write_table(pa.table({"text": documents(1200)}), tmp_path / "texts.parquet", row_group_size=100)
    flags = ["--input", tmp_path / "texts.parquet", "--tokenizer", "bytes", "--shard-size", 100_000, "--num-workers", 2]
    succeed(run("tests/workers/slow_prepare_worker.py", *flags, "--output-dir", tmp_path / "local"))
    local = {name: (tmp_path / "local" / name).read_bytes() for name in hashes(tmp_path / "local")}
    changes = {"method": "PUT|POST|DELETE", "key": "*/[.pt]*"}
    rng = random.Random(kills)
    with object_server(kind) as server:
        environment = os.environ | server.environment | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
        flags += ["--scratch-dir", tmp_path / "scratch", "--output-dir"]
        number = killed = resumed = 0  # of the folder in the bucket

        def begin() -> "subprocess.Popen[str]":
            command = [sys.executable, "tests/workers/prepare_to_url_worker.py", *flags, server.at(f"data{number}")]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, **pipes)

        def is_complete() -> bool:
            found = server.snapshot(f"data{number}/")
            # A lease that is listed late may be left over.
            return local == {
                name.partition("/")[2]: content for name, content in found.items() if "/.partial/lease/" not in name
            }

        server.list_late(1)
        while killed < kills:
            process = begin()
            server.fail(503, times=2, skip=rng.randrange(40), **changes)
            server.lose(times=1, skip=rng.randrange(40), **changes)
            server.kill(process.pid, before=rng.random() < 0.5, skip=rng.randrange(24), **changes)
            said, errors = process.communicate()
            server.clear()
            resumed += "resuming after" in said
            shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
            if process.returncode == 0:
                assert is_complete()
                number += 1
                continue
            assert process.returncode == -signal.SIGKILL, said + errors
            killed += 1
        if kind == "s3" or kills > 1:  # gcsfs tries for half a minute
            process = begin()
            server.expire_credentials()
            said, errors = process.communicate()
            assert process.returncode == 1, said + errors
            assert len(errors.splitlines()) == 1, errors
            server.renew_credentials()
        process = begin()
        said, errors = process.communicate()
        assert process.returncode == 0, said + errors
        assert f"{server.at(f'data{number}')}/train: " in said
        assert is_complete()
        assert kills < 20 or resumed > 5, resumed
