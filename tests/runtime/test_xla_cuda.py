"""The CUDA plugin as torch_xla asks for it, without a GPU: found in every process, one per GPU, with a coordinator."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, require_xla, run, succeed

# What torch_xla asks a plugin before it starts a client, which would need the GPU.
PROGRAM = """
import json, os, sys
import torch_xla
from torch_xla.experimental import plugins

plugin = plugins._plugin_registry["GPU"]
print(json.dumps({
    "chips": plugin.physical_chip_count(),
    "options": plugin.client_create_options(),
    "coordinator": plugin.requires_xla_coordinator(),
    "library": plugin.library_path(),
    "jax": any(name.split(".")[0] in ("jax", "jaxlib") for name in sys.modules),
}))
"""


def ask(folder: Path, **environment: str) -> dict:
    require_xla()
    # What pip writes from pyproject.toml, and the plugin's files, where the interpreter looks first.
    metadata = folder / "gpt2xla-0.1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gpt2xla\nVersion: 0.1.0\n")
    section = (
        (ROOT / "pyproject.toml").read_text().split('[project.entry-points."torch_xla.plugins"]\n')[1].split("\n\n")[0]
    )
    (metadata / "entry_points.txt").write_text("[torch_xla.plugins]\n" + section.replace('"', ""))
    (folder / "jax_plugins" / "xla_cuda12").mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return json.loads(succeed(run("-c", PROGRAM, PYTHONPATH=path, PJRT_DEVICE="GPU", **environment)))


def test_one_process_takes_the_first_gpu(tmp_path: Path) -> None:
    answers = ask(tmp_path, GPU_NUM_DEVICES="1")
    assert answers["chips"] == 1
    assert answers["options"] == {"platform_name": "gpu", "visible_devices": [0]}
    assert not answers["coordinator"]
    assert answers["library"] == str(tmp_path / "jax_plugins" / "xla_cuda12" / "xla_cuda_plugin.so")
    assert not answers["jax"], "the plugin is a library; JAX itself stays out"


@pytest.mark.slow
def test_the_second_of_two_processes_takes_the_second_gpu(tmp_path: Path) -> None:
    answers = ask(tmp_path, GPU_NUM_DEVICES="2", PJRT_LOCAL_PROCESS_RANK="1", PJRT_LOCAL_PROCESS_COUNT="2")
    assert answers["chips"] == 2
    assert answers["options"] == {"platform_name": "gpu", "visible_devices": [1], "node_id": 1, "num_nodes": 2}
    assert answers["coordinator"]
