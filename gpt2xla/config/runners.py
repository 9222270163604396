"""Options that only one of the two runners has, as frozen dataclasses like those of `run.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpt2xla.config.options import option


@dataclass(frozen=True)
class TorchConfig:
    """Torch runner (run_pretrain.py)"""

    ddp_backend: Literal["nccl", "gloo"] | None = option(
        None, "how processes under torchrun communicate (default: nccl on CUDA, else gloo)"
    )
    compile_cache: str = option(
        "~/.cache/gpt2xla",
        "folder that keeps torch.compile's programs for the next start; '' leaves it to torch",
        is_path=True,
    )
    zero1: bool = option(False, "under torchrun: split the optimizer's state over processes")
    fsdp: bool = option(
        False, "under torchrun: split weights, gradients and optimizer state over processes, for large models"
    )


@dataclass(frozen=True)
class XlaConfig:
    """XLA runner (run_pretrain_xla.py)"""

    mp_start_method: Literal["spawn", "fork"] = option(
        "spawn", "how worker processes start; in a notebook, fork works only before anything there uses the device"
    )
    ddp: bool = option(
        False,
        "reduce gradients with DistributedDataParallel instead of one all-reduce after backward; compiles more graphs",
    )
    spmd: bool = option(
        False, "run one process per host, split each batch over its devices, and let XLA add the communication"
    )
    fsdp: bool = option(
        False, "with --spmd: split weights, gradients and optimizer state over the devices too, for large models"
    )
    use_syncfree_optim: bool = option(False, "torch_xla's sync-free optimizer: less host time per step")
    compile_cache: str = option(
        "~/.cache/gpt2xla",
        "folder that keeps a TPU's compiled programs for the next start; '' keeps none",
        is_path=True,
    )
