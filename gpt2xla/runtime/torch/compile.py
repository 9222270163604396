"""torch.compile of the model's blocks: one program for all of them, made when the first one runs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2xla.errors import RunFailed, in_one_line, user_error
from gpt2xla.logs.console import say
from gpt2xla.model.kernels import Kernels
from gpt2xla.processes.signals import compiling
from gpt2xla.runtime.base import CompileWatch


def open_compile_cache(folder: str) -> None:
    """Let the next start find what this process compiles; "" leaves that to torch (in /tmp)."""
    if folder:
        path = Path(folder).expanduser() / "torch"
        with user_error(f"--compile-cache {folder}"):
            path.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.fspath(path))


class CompiledBlock(CompileWatch):
    """Calls a block, compiled; once for each shape, which the first call with it announces if this process `prints`."""

    def __init__(self, prints: bool) -> None:
        self._prints = prints
        # Inside DistributedDataParallel, Dynamo would cut each block at every 25 MB of weights, to overlap their reduction
        # with the rest of a larger program. Blocks overlap as they are, and the cuts keep more activations.
        torch._dynamo.config.optimize_ddp = False
        self._compiled = torch.compile(_call, backend="inductor", dynamic=False)
        self._known: set[tuple[torch.Size, bool, bool]] = set()

    def programs(self) -> int:
        return len(self._known)

    def __call__(self, block: nn.Module, x_BTD: Tensor, kernels: Kernels, documents: Tensor | None) -> Tensor:
        program = (x_BTD.shape, block.training, torch.is_grad_enabled())
        if _is_eager or program in self._known or torch.compiler.is_compiling():
            return self._compiled(block, x_BTD, kernels, documents)
        name = "training step" if program[1] else "validation step"
        if self._prints:
            say(f"compiling the blocks of the {name} ...")
        start = time.perf_counter()
        try:
            is_first = not any(is_training for _, is_training, _ in self._known)
            with compiling(before_training=block.training and is_first):
                y_BTD = self._compiled(block, x_BTD, kernels, documents)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = in_one_line(error.inner_exception)
            raise RunFailed(f"torch.compile failed ({reason}); start again without it: --no-compile") from error
        self._known.add(program)
        if self._prints:
            say(f"compiled in {time.perf_counter() - start:.0f} s")
        return y_BTD


_is_eager = False


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled code eagerly inside, which takes more memory but no minutes, and is not announced."""
    global _is_eager
    _is_eager = True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _is_eager = False


def _call(block: nn.Module, x_BTD: Tensor, kernels: Kernels, documents: Tensor | None) -> Tensor:
    return block(x_BTD, kernels, documents)
