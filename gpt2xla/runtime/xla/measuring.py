"""A runtime that also writes down what it is and what it costs, for scripts/tpu_report.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.runtime as xr
from torch import nn

from gpt2xla.config import TrainConfig, XlaConfig
from gpt2xla.files import write_whole
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.xla.runtime import XlaRuntime


class Measuring(XlaRuntime):
    """Is mixed into the runtime of a run. The main process writes `file` again whenever it knows more, so that it also holds
    what a run that failed had found out."""

    file: Path

    def __init__(self, options: XlaConfig, config: TrainConfig) -> None:
        super().__init__(options, config)
        self._facts: dict[str, Any] = {}
        flags = {name: os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")}
        self._write(
            type=xr.device_type(),
            kind=self.device_kind,
            devices=self.devices,
            precision=self.precision.name,
            flags=flags,
        )

    def setup_model(self, model: GPT2, evaluated_tokens: int | None = None) -> nn.Module:
        module = super().setup_model(model, evaluated_tokens)
        self._write(
            kernels=model.computation, parameters=model.num_parameters(), flops_per_token=model.flops_per_token(),
            peak_flops=self.peak_flops(),
        )  # fmt: skip
        return module

    def wait(self, behind: int = 0) -> None:
        super().wait(behind)
        if not behind:
            self._write(compile_seconds=_compile_seconds())

    def close(self) -> None:
        self._write(memory=self._memory())
        super().close()

    def _memory(self) -> dict[str, int] | None:
        """Return the bytes of this process's device as torch_xla counts them; None where it cannot, such as on a CPU."""
        if xr.is_spmd():  # torch_xla asks the virtual device, and aborts
            return None
        try:
            return dict(xm.get_memory_info(self.device))
        except RuntimeError:
            return None

    def _write(self, **facts: Any) -> None:
        if self.is_main:
            self._facts |= facts
            write_whole(self.file, json.dumps(self._facts))


def _compile_seconds() -> list[float]:
    """Return what each program compiled so far in this process took, in their order."""
    compiled = met.metric_data("CompileTime")
    return [round(nanoseconds / 1e9, 2) for _, nanoseconds in compiled[2]] if compiled else []
