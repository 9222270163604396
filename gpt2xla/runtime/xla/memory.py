"""What XLA says about a device's memory, and which micro-batch fits it. Imports no torch_xla."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import traceback
from pathlib import Path
from typing import Any

from gpt2xla.config import XlaConfig
from gpt2xla.errors import is_out_of_memory
from gpt2xla.files import read_json, write_whole
from gpt2xla.runtime.base import GIB, Memory, Shortage
from gpt2xla.runtime.memory import compiled_step_bytes, estimated
from gpt2xla.runtime.trial import Trial
from gpt2xla.runtime.xla import compiler_flags
from gpt2xla.runtime.xla.compiler_messages import HBM_GIB, compiler_figures
from gpt2xla.runtime.xla.pallas_choice import blocks_are_kernels
from gpt2xla.runtime.xla.versions import installed

# Messages of XLA's several runtimes; a TPU's compiler gives figures, too.
_IS_FULL = ("RESOURCE_EXHAUSTED", "Out of memory allocating", "Out of memory while trying to allocate")

_NOTES = "micro-batches"  # the folder of what compilers said, in --compile-cache
# Options that change no compiled training step.
_BESIDE = (
    "train_steps", "epochs", "eval", "valid", "hellaswag", "sample", "sketches", "special", "save", "on_save", "skip",
    "max_", "keep", "early",
)  # fmt: skip


class XlaMemory(Memory):
    """Knows when a device of this kind is out of memory, and chooses a micro-batch by a TPU compiler's verdict.

    The first try is what a formula says. If the compiler refuses it, its figures give the next one, so that one compile is
    wasted at most. A run starts with what an earlier one found."""

    def __init__(self, device_kind: str, options: XlaConfig | None = None, state_split: int = 1) -> None:
        self.device_kind, self.state_split = device_kind, state_split
        self.options = options or XlaConfig(compile_cache="")

    def shortage(self, error: Exception) -> Shortage | None:
        if figures := compiler_figures(str(error)):
            needed, memory = figures
            size = f"{memory / GIB:.2f} GiB, of which the program needs {needed / GIB:.2f}"
            return Shortage(f"{self.device_kind} ({size})", memory, needed, self.state_split)
        if any(words in str(error) for words in _IS_FULL) or is_out_of_memory(error):
            return Shortage(self.device_kind, state_split=self.state_split)
        return None

    def first_try(self, trial: Trial) -> int | None:
        """Return the share that fits by the formula; None if this kind's memory is not known."""
        memory = HBM_GIB.get(self.device_kind)
        if memory is None:
            return None

        def fits(share: int) -> bool:
            config = trial.config_of(share)
            kernels = blocks_are_kernels(self.device_kind, config.model, config.train, spmd=self.options.spmd)
            needed = compiled_step_bytes(
                config.model, config.train, trial.parameters, share, self.state_split, kernels=kernels
            )
            return needed <= memory * GIB

        return next((share for share in trial.shares if fits(share)), trial.shares[-1])

    def most_that_fit(self, trial: Trial) -> int:
        share = self.first_try(trial)
        if share is None:
            return super().most_that_fit(trial)
        while share > trial.shares[-1]:  # the smallest needs no trial: there is nothing to try after it
            try:
                trial.update(share)
                break
            except Exception as error:
                shortage = self.shortage(error)
                if shortage is None:
                    raise
                traceback.clear_frames(error.__traceback__)
            fewer = share // 2 if shortage.needed is None else estimated(shortage, share, trial.parameters)
            share = trial.at_most(min(fewer, share - 1))
        return share

    def remembered(self, trial: Trial) -> int | None:
        note = self._note(trial)
        try:
            share = read_json(note)["sequences_per_device"] if note else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return share if share in trial.shares else None

    def remember(self, trial: Trial, share: int) -> None:
        if (note := self._note(trial)) is None:
            return
        with contextlib.suppress(OSError):  # the next run finds out again
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps({"sequences_per_device": share, **self._step(trial)}, indent=2) + "\n")

    def _note(self, trial: Trial) -> Path | None:
        """Return the file for the verdict on this step; None if none is kept."""
        if not self.options.compile_cache or self.device_kind not in HBM_GIB:
            return None
        name = hashlib.sha256(json.dumps(self._step(trial), sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.options.compile_cache).expanduser() / _NOTES / f"{name}.json"

    def _step(self, trial: Trial) -> dict[str, Any]:
        """Return all that decides whether a step fits."""
        config, options = trial.config, dataclasses.asdict(self.options)
        train = {n: value for n, value in dataclasses.asdict(config.train).items() if not n.startswith(_BESIDE)}
        return {
            "device": self.device_kind, "devices": trial.devices, "versions": installed(("torch_xla", "libtpu")),
            "model": dataclasses.asdict(config.model), "train": train, "optimizer": config.optim.optim_type,
            "runner": {name: options[name] for name in ("ddp", "spmd", "fsdp", "use_syncfree_optim")},
            "compiler": os.environ.get(compiler_flags.VARIABLE, ""),
        }  # fmt: skip
