"""NVIDIA GPUs under PyTorch/XLA: JAX's CUDA plugin, which speaks the version of PJRT that torch_xla 2.9 does.

torch_xla 2.9 has no CUDA plugin of its own any more. `pyproject.toml` names this class as the plugin "GPU" (entry points
`torch_xla.plugins`), so every process that imports torch_xla knows it, spawned workers too. Nothing of CUDA is loaded until
the plugin is used."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from torch_xla.experimental import plugins

from gpt2xla.runtime.xla.environment import CUDA_PLUGIN, gpus


class CudaPlugin(plugins.DevicePlugin):
    """One process per GPU of this host; GPU_NUM_DEVICES takes fewer than all."""

    def library_path(self) -> str:
        spec = importlib.util.find_spec(CUDA_PLUGIN)
        assert spec is not None, "environment.prepare has seen it"
        assert spec.submodule_search_locations
        return str(Path(spec.submodule_search_locations[0]) / "xla_cuda_plugin.so")

    def physical_chip_count(self) -> int:
        return int(os.environ.get("GPU_NUM_DEVICES") or gpus(os.environ))

    def configure_single_process(self) -> None:
        pass

    def client_create_options(self) -> dict[str, Any]:
        # torch_xla.launch has set both by the time that the client is made.
        rank, processes = int(os.environ.get("PJRT_LOCAL_PROCESS_RANK", "0")), _processes()
        several = {"node_id": rank, "num_nodes": processes} if processes > 1 else {}
        return {"platform_name": "gpu", "visible_devices": [rank], **several}

    def requires_xla_coordinator(self) -> bool:
        """Several processes find each other, and NCCL its ids, through the first one's coordinator."""
        return _processes() > 1


def _processes() -> int:
    return int(os.environ.get("PJRT_LOCAL_PROCESS_COUNT", "1"))
