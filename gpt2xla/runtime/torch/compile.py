"""torch.compile of the model's blocks: one program for all of them, made when the first one runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2xla.errors import RunFailed, in_one_line, user_error
from gpt2xla.logs.console import say
from gpt2xla.model.kernels import Kernels

# Model FLOPs of a run beyond which it makes up for the compile's half minute: a few minutes of a slow GPU, where it saves a
# third of the time, and a quarter of an hour of two cores, where it saves a twentieth.
_PAYS = {"cuda": 1e15, "cpu": 2e14}


def pays(device: torch.device, flops: float) -> bool:
    """Whether to compile when the user did not say: for `flops` of one device, where a compiler is there."""
    return flops >= _PAYS.get(device.type, float("inf")) and why_not_compiled(device) is None


def why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine; None if it has all."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "it needs Triton, and a GPU of compute capability 7.0 or more"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "it needs a C++ compiler, such as g++"
    return None


def open_compile_cache(folder: str) -> None:
    """Let the next start find what this process compiles; "" leaves that to torch (in /tmp)."""
    if folder:
        path = Path(folder).expanduser() / "torch"
        with user_error(f"--compile-cache {folder}"):
            path.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.fspath(path))


class CompiledBlock:
    """Calls a block, compiled; once for each shape, which the first call with it announces.

    Args:
        prints: whether this is the one process that prints.
    """

    def __init__(self, prints: bool) -> None:
        self._prints = prints
        self._compiled = torch.compile(_call, backend="inductor", dynamic=False)
        self._known: set[tuple[torch.Size, bool, bool]] = set()

    @property
    def programs(self) -> int:
        return len(self._known)

    def __call__(self, block: nn.Module, x_BTD: Tensor, kernels: Kernels) -> Tensor:
        program = (x_BTD.shape, block.training, torch.is_grad_enabled())
        if program in self._known or torch.compiler.is_compiling():
            return self._compiled(block, x_BTD, kernels)
        name = "training step" if program[1] else "validation step"
        if self._prints:
            say(f"compiling the blocks of the {name} ...")
        start = time.perf_counter()
        try:
            y_BTD = self._compiled(block, x_BTD, kernels)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = in_one_line(error.inner_exception)
            raise RunFailed(f"torch.compile failed ({reason}); go on without it: --no-compile") from error
        self._known.add(program)
        if self._prints:
            say(f"compiled in {time.perf_counter() - start:.0f} s")
        return y_BTD


def _call(block: nn.Module, x_BTD: Tensor, kernels: Kernels) -> Tensor:
    return block(x_BTD, kernels)
