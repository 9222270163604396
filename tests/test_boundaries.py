"""The shape of the house: who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SOURCES = [*ROOT.glob("*.py"), *(ROOT / "gpt2xla").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_only_the_xla_runtime_and_its_runner_import_torch_xla() -> None:
    importers = {str(f.relative_to(ROOT)) for f in SOURCES if any(name.startswith("torch_xla") for name in imports(f))}
    runtimes = {str(f.relative_to(ROOT)) for f in (ROOT / "gpt2xla" / "runtime").glob("xla*.py")}
    assert importers - runtimes == {"run_pretrain_xla.py"}


def test_only_the_runtimes_and_generation_know_devices() -> None:
    knowing = {str(f.relative_to(ROOT)) for f in SOURCES if "torch.cuda" in f.read_text()}
    assert knowing == {"gpt2xla/runtime/torch.py", "gpt2xla/runtime/precision.py", "generate.py"}
    trainer = (ROOT / "gpt2xla" / "trainer.py").read_text()
    assert not any(word in trainer for word in ("xla:", '"xla"', "cuda", "isinstance(runtime"))


def test_importing_the_package_loads_no_xla_and_reads_no_environment() -> None:
    program = """
import os, sys
class Watched(dict):
    def __getitem__(self, key): raise AssertionError(f"read {key}")
    get = __contains__ = __getitem__
modules = ["gpt2xla", "gpt2xla.config", "gpt2xla.config_file", "gpt2xla.cli", "gpt2xla.errors", "gpt2xla.exits"]
import argparse, yaml
os.environ = Watched()
for name in modules:
    __import__(name)
assert not any(name.startswith("torch") for name in sys.modules), "--help must not wait for torch"
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    program = """
import sys, pkgutil, importlib, gpt2xla
for module in pkgutil.walk_packages(gpt2xla.__path__, "gpt2xla."):
    if not module.name.startswith("gpt2xla.runtime.xla"):
        importlib.import_module(module.name)
assert "torch_xla" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
