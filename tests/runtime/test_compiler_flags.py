"""The TPU compiler's flags that a run adds to the user's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from gpt2xla.config import RunConfig, XlaConfig
from gpt2xla.runtime.xla import compiler_flags, environment
from gpt2xla.runtime.xla.compiler_flags import add_to, is_loaded, with_ours
from gpt2xla.runtime.xla.versions import RELEASES
from gpt2xla.tpu_check import check

V5E = "TPU v5 lite"


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests know the flags, and libtpu be one that was tried."""
    monkeypatch.setattr(compiler_flags, "installed", lambda names: {"libtpu": "0.0.21.1"})
    monkeypatch.setattr(compiler_flags, "_REPLICAS", {V5E: {"xla_a": "1", "xla_ab": "true"}, "TPU v3": {"xla_c": "0"}})
    monkeypatch.setattr(compiler_flags, "_FSDP", {V5E: {"xla_ab": "false", "xla_d": "2"}})


@pytest.mark.parametrize(
    ("given", "kind", "fsdp", "expected"),
    [
        (None, V5E, False, "--xla_a=1 --xla_ab=true"),
        (None, V5E, True, "--xla_a=1 --xla_ab=false --xla_d=2"),
        (None, "TPU v3", True, "--xla_c=0"),
        (None, "TPU v99", False, ""),
        ("--xla_ab=false --user=1", V5E, False, "--xla_ab=false --user=1 --xla_a=1"),  # the user's value wins
        ("xla_a --xla_ab=true", V5E, False, "xla_a --xla_ab=true"),  # libtpu takes both ways of writing them
        ("", V5E, True, ""),  # our flags are left out
    ],
)
def test_ours_are_added_to_the_users(given: str | None, kind: str, fsdp: bool, expected: str) -> None:
    assert with_ours(given, kind, fsdp=fsdp) == expected
    again = with_ours(expected, kind, fsdp=fsdp)  # in the next call of a notebook's kernel, or in a worker
    assert again == expected


def test_untried_libtpu_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ({"libtpu": "0.0.210"}, {"libtpu": "0.1.21"}, {}):
        monkeypatch.setattr(compiler_flags, "installed", lambda names, version=version: version)
        assert with_ours("--user=1", V5E) == "--user=1"
        assert (version.get("libtpu") or "none is installed") in (compiler_flags.why_none() or "")


def test_the_known_releases_were_tried() -> None:
    assert {release.libtpu for release in RELEASES} <= set(compiler_flags._TRIED)


def test_a_run_sets_them_before_torch_xla_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "tpu_chips", lambda: [V5E] * 4)
    monkeypatch.setattr(compiler_flags, "is_loaded", lambda: False)  # another test may have loaded it in this process
    variables = {"PJRT_DEVICE": "TPU", "LIBTPU_INIT_ARGS": "--user=1"}
    environment.prepare(variables, fsdp=True)
    assert variables["LIBTPU_INIT_ARGS"] == "--user=1 --xla_a=1 --xla_ab=false --xla_d=2"
    variables = {"PJRT_DEVICE": "CPU"}
    environment.prepare(variables)
    assert variables == {"PJRT_DEVICE": "CPU"}


def test_the_check_compiles_with_the_flags_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compiles(module: str, folder: Path, request: dict[str, Any], flags: str = "") -> CompletedProcess[str]:
        asked.append((module, flags))
        Path(request["output"]).write_text(json.dumps({"fits": False}))
        return CompletedProcess([module], 0)

    monkeypatch.setattr(check, "_trace", lambda *request: ("graph", {}))
    monkeypatch.setattr(check, "_run", compiles)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--user=1")
    config = RunConfig.from_flat({"train_batch_size": 8})
    report = check.check(config, XlaConfig(spmd=True, fsdp=True), "v5e-8", lambda line: None)
    assert asked == [("gpt2xla.tpu_check.compile", "--user=1 --xla_a=1 --xla_ab=false --xla_d=2")]
    assert report["compiler_flags"] == asked[0][1]


def test_too_late_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_flags, "is_loaded", lambda: True)
    variables: dict[str, str] = {}
    assert "restart the notebook's kernel" in (add_to(variables, V5E) or "")
    assert variables == {}
    assert add_to({"LIBTPU_INIT_ARGS": "--xla_a=3 --xla_ab=false"}, V5E) is None  # they are in force


def test_a_loaded_libtpu_is_noticed(tmp_path: Path) -> None:
    assert not is_loaded(tmp_path / "nowhere")
    libtpu = pytest.importorskip("libtpu")
    program = f"""
import mmap
from gpt2xla.runtime.xla.compiler_flags import is_loaded
assert not is_loaded()
with open({libtpu.get_library_path()!r}, "rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
    raise SystemExit(0 if is_loaded() else 3)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, env=dict(os.environ)).returncode == 0
