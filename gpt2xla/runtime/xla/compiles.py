"""Watches XLA's compiles: announces the first one of each step, and warns of later ones, with the cause."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch_xla
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr

from gpt2xla.data.windows import Batch
from gpt2xla.errors import counted, user_error
from gpt2xla.logs.console import say
from gpt2xla.logs.progress import Progress
from gpt2xla.runtime.base import CompileWatch

_BETWEEN = "between the steps"


def open_compile_cache(folder: str) -> None:
    """Let the next start find the programs that this process compiles for a TPU; "" keeps none.

    Call it before anything is computed. Nothing is kept on a CPU: XLA:CPU cannot load what it stored."""
    if folder and xr.device_type() == "TPU" and not torch_xla._XLAC._xla_computation_cache_is_initialized():
        path = Path(folder).expanduser() / torch_xla.__version__ / f"process-{xr.process_index()}"
        with user_error(f"--compile-cache {folder}"):
            path.mkdir(parents=True, exist_ok=True)
        xr.initialize_cache(os.fspath(path))


def count_compiles() -> int:
    """Return how many programs this process has compiled so far; one loaded from the cache is not compiled."""
    compiled = met.metric_data("CompileTime")
    return compiled[0] if compiled else 0


class XlaCompileWatch(CompileWatch):
    """Knows in which part of a run programs are compiled.

    A part compiles on the first pass through it, or never. A later compile costs as much time as the first one, so the
    process that `prints` warns of it, once for each cause. The first `warm_up` passes through a part cause no warning."""

    def __init__(self, prints: bool, warm_up: int = 1) -> None:
        self._prints = prints
        self._warm_up = warm_up
        # torch_xla counts per process: where replicas are threads of one (TPU v2, v3), it is unknown whose compile it was.
        self._warns = prints and (xr.is_spmd() or xr.addressable_device_count() == 1)
        self._part = _BETWEEN
        self._calls: dict[str, int] = {}
        self._compiled = count_compiles()
        self._fallbacks = _count_fallbacks()
        self._odd_shape = ""
        self._warned: set[tuple[str, str]] = set()
        self._step_began = time.perf_counter()

    def programs(self) -> int:
        return count_compiles()

    def trace_ms(self) -> float | None:
        return (time.perf_counter() - self._step_began) * 1e3

    @contextlib.contextmanager
    def not_tracing(self) -> Iterator[None]:
        """Leave what is done inside out of `trace_ms`."""
        start = time.perf_counter()
        yield
        self._step_began += time.perf_counter() - start

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Wrap a part of the run, which may hold other parts: a compile counts for the innermost."""
        self._settle()
        around, self._part = self._part, name
        self._calls.setdefault(name, 0)
        try:
            yield
            self._settle()
            self._calls[name] += 1
        finally:
            self._part = around
            if not self._calls[name]:  # it failed, and its next pass is again the first
                del self._calls[name]

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Wrap a part whose first pass is known to compile, and is announced."""
        first = name not in self._calls
        self._settle()
        before, start = self._compiled, time.perf_counter()
        if first:
            self._say(f"compiling the {name} (on a TPU this takes minutes) ...")
        with self.part(name), Progress(f"compiling the {name}", None, shown=first and self._prints):
            self._step_began = time.perf_counter()
            yield
        if first:
            # From the first step on, nothing between steps may compile either.
            self._calls[_BETWEEN] = self._warm_up
            programs = counted(self._compiled - before, "new program")
            self._say(f"the {name} is compiled: {time.perf_counter() - start:.1f} s, {programs}")

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches, watched for one of another shape, the most common cause of a compile."""
        last: tuple[int, ...] = ()
        for batch in batches:
            shape = tuple(batch.input_ids.shape)
            if last and shape != last:
                self._odd_shape = f"a batch of {shape} where the one before was {last}"
            last = shape
            yield batch

    def _settle(self) -> None:
        """Count what was compiled since the last call for the current part."""
        compiled, fallbacks = count_compiles(), _count_fallbacks()
        if self._warns and compiled > self._compiled and self._calls.get(self._part, 0) >= self._warm_up:
            kind, cause = self._cause({name for name, n in fallbacks.items() if n > self._fallbacks.get(name, 0)})
            if (self._part, kind) not in self._warned:
                self._warned.add((self._part, kind))
                call = f"in the {self._part}, call {self._calls[self._part] + 1}"
                where = self._part if self._part == _BETWEEN else call
                self._say(f"warning: XLA compiled again, {where}: {cause}", error=True)
        self._compiled, self._fallbacks, self._odd_shape = compiled, fallbacks, ""

    def _cause(self, grown: set[str]) -> tuple[str, str]:
        if self._odd_shape:
            return "shape", self._odd_shape
        if grown:
            names = ", ".join(sorted(grown))
            read = " (a value was read: .item(), print or if)" if "aten::_local_scalar_dense" in grown else ""
            return names, f"the host did some of the step's work: {names}{read}"
        return "program", (
            "the traced program is another one, at the same batch shape: a Python number became a constant of it, or the "
            "code took another path; PT_XLA_DEBUG_LEVEL=2 in the environment shows the lines"
        )

    def _say(self, text: str, error: bool = False) -> None:
        if self._prints:
            say(text, error)


def _count_fallbacks() -> dict[str, int]:
    """Return, by name, how often operations without an XLA lowering ran on the host; reading a value is one."""
    return {name: met.counter_value(name) for name in met.counter_names() if name.startswith("aten::")}
