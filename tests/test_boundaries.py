"""The shape of the house: which file may import which."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "gpt2xla"
SOURCES = [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]

# From top to bottom: a room imports only from rooms below it.
ROOMS = [
    "__main__", "commands", "playground", "doctor", "tpu_check", "training", "evals", "checkpoint", "generation", "runtime",
    "chat", "sketches", "data", "optim", "model", "logs", "cli", "config", "hub", "processes", "storage", "files", "errors",
]  # fmt: skip


def imports(file: Path) -> set[str]:
    """Modules that `file` imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def project_imports() -> dict[str, set[str]]:
    """For each module of the package, the modules of the package that it imports."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in names.items()}

    def module_of(name: str) -> str | None:
        return next((m for m in (name, name.rpartition(".")[0]) if m in modules), None)

    return {name: {m for i in imports(file) if (m := module_of(i))} - {name} for name, file in modules.items()}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_rooms_import_downwards_only() -> None:
    graph = {module: {m for m in used if "." in m} for module, used in project_imports().items() if "." in module}
    assert {room_of(module) for module in graph} == set(ROOMS)
    upwards = [
        f"{module} imports {used}"
        for module, all_used in graph.items()
        for used in all_used
        if ROOMS.index(room_of(used)) < ROOMS.index(room_of(module))
    ]
    assert not upwards


def test_the_page_names_all_rooms() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    below = [room for room in ROOMS if room != "__main__"]
    assert [room for room in below if f"`{room}/`" not in page and f"`{room}.py`" not in page] == []


def test_no_circles_between_files_or_folders() -> None:
    graph = project_imports()
    assert tuple(graphlib.TopologicalSorter(graph).static_order())
    folders: dict[str, set[str]] = {}
    for module, all_used in graph.items():
        folder = folder_of(module)
        folders.setdefault(folder, set()).update(folder_of(used) for used in all_used)
    for folder, used in folders.items():
        used.discard(folder)
    assert tuple(graphlib.TopologicalSorter(folders).static_order())


def folder_of(module: str) -> str:
    """`gpt2xla.data.shards` -> `gpt2xla.data`; a file at the top is its own folder."""
    folder = module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
    return module if folder == "gpt2xla" else folder


def test_the_package_is_small_at_its_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    assert len([folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()]) <= 16
    lengths = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {str(file) for file, lines in lengths.items() if lines > 430} == set()


def test_only_the_xla_runtime_and_its_runner_import_torch_xla() -> None:
    importers = {str(f.relative_to(ROOT)) for f in SOURCES if any(name.startswith("torch_xla") for name in imports(f))}
    runtime = {str(f.relative_to(ROOT)) for f in (PACKAGE / "runtime" / "xla").glob("*.py")}
    assert importers - runtime == {"gpt2xla/commands/train_xla.py", "gpt2xla/tpu_check/placeholder_runtime.py"}


def test_kinds_of_devices_are_known_in_few_files() -> None:
    knowing = {str(f.relative_to(ROOT)) for f in SOURCES if "torch.cuda" in f.read_text()}
    generation = {"gpt2xla/generation/devices.py", "gpt2xla/generation/cuda_graphs.py"}
    assert knowing == {"gpt2xla/runtime/torch/accelerators.py"} | generation
    asking = [f.name for f in (PACKAGE / "runtime" / "torch").glob("*.py") if "device.type" in f.read_text()]
    assert not asking, "accelerators.py has an answer for each kind of device"
    for file in (PACKAGE / "training").glob("*.py"):
        assert not any(word in file.read_text() for word in ("xla:", '"xla"', "cuda", "isinstance(runtime")), file


def test_importing_the_package_loads_no_xla_and_reads_no_environment() -> None:
    program = """
import os, sys
class Watched(dict):
    def __getitem__(self, key): raise AssertionError(f"read {key}")
    get = __contains__ = __getitem__
modules = ["gpt2xla", "gpt2xla.config", "gpt2xla.config.config_file", "gpt2xla.cli", "gpt2xla.errors"]
modules += ["gpt2xla.processes.exits"]
import argparse, yaml
os.environ = Watched()
for name in modules:
    __import__(name)
assert not any(name.startswith("torch") for name in sys.modules), "--help must not wait for torch"
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    program = """
import sys, pkgutil, importlib, importlib.util, gpt2xla
left_out = ["gpt2xla.runtime.xla.", "gpt2xla.tpu_check.placeholder"]
if not importlib.util.find_spec("triton"):  # which torch for CPUs comes without
    left_out.append("gpt2xla.model.fused.")
for module in pkgutil.walk_packages(gpt2xla.__path__, "gpt2xla."):
    if not module.name.startswith(tuple(left_out)):
        importlib.import_module(module.name)
assert "torch_xla" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone, and would collect none of the tests."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in set(names) if names.count(name) > 1] == []
