"""Decoding on a CUDA GPU: the reading of a token is recorded once, as a CUDA graph, and replayed for the tokens after it.

GPT-2 (124M) takes 164 short kernels for it, which the host has to launch one by one; a replay is one launch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2xla.errors import in_one_line
from gpt2xla.runtime.base import Device, P, T


class CudaDevice:
    """Implements `base.Device` by another device on CUDA, but records the steps with the names in `recorded`.

    Such a step takes tensors, and what else decides its work. It returns a tensor, which its next call overwrites. All other
    memory that it uses, such as weights, must stay in place while the step exists. Where recording fails, steps are run as
    they are, and `tell` is given the reason once."""

    # Each other number of keys is another recording, and another plan of cuDNN's where torch prefers it. Attention copies a
    # mask in each layer if 8 does not divide its rows' length; cuDNN had faults with lengths that 128 does not divide.
    slots_at_once = 128

    def __init__(self, plain: Device, recorded: Collection[str], tell: Callable[[str], None]) -> None:
        self.device, self._plain, self._recorded, self._tell = plain.device, plain, recorded, tell
        self._can_record = True
        self._stream = torch.cuda.Stream(self.device)  # only to record on: the default stream cannot
        # Recordings share memory, since none needs what another one left there. It is given up with the last of them, but
        # stays reserved then, and the next one could not use it. So the newest one is kept.
        self._pool = torch.cuda.graph_pool_handle()
        self._newest: torch.cuda.CUDAGraph | None = None

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[Any]:
        return self._plain.autocast()

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        step = self._plain.compile_step(step, name)
        return _RecordedStep(step, self) if name in self._recorded else step  # type: ignore[arg-type, return-value]

    def record(self, step: Callable[..., Tensor], arguments: tuple[Any, ...]) -> _Recording | None:
        """Record `step(*arguments)` without doing it. Return None if this GPU cannot."""
        if not self._can_record:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                # Other threads may use the GPU meanwhile, such as the one that fetches batches.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = step(*arguments)
                finally:
                    graph.capture_end()
                    self._newest = graph
        except Exception as error:  # whatever it is, the step itself is known to run
            self._can_record = False
            with suppress(Exception):  # what capture_begin began; otherwise training would lack memory
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            self._tell(f"note: generating without CUDA graphs, which is slower: {in_one_line(error)}")
            return None
        return _Recording(graph, _tensors(arguments), result)


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]  # which it reads
    result: Tensor  # which it writes


class _RecordedStep:
    """Runs a step with the first arguments of a kind, so that kernels are loaded; records it with the second, and replays it
    from then on. Arguments are of one kind if their tensors have equal shapes and all else is equal."""

    def __init__(self, step: Callable[..., Tensor], device: CudaDevice) -> None:
        self._step, self._device = step, device
        self._recordings: dict[tuple[Any, ...], _Recording | None] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        kind = tuple(a.shape if isinstance(a, Tensor) else a for a in arguments)
        if kind not in self._recordings:
            self._recordings[kind] = None
            return self._step(*arguments)
        if self._recordings[kind] is None:
            self._recordings[kind] = self._device.record(self._step, arguments)
        if (recording := self._recordings[kind]) is None:
            return self._step(*arguments)
        for place, tensor in zip(recording.inputs, _tensors(arguments), strict=True):
            place.copy_(tensor)
        recording.graph.replay()
        return recording.result


def _tensors(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(a for a in arguments if isinstance(a, Tensor))
