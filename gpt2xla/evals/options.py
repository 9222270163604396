"""What the evaluation programs share: their options, and the runtime that these ask for. Only opening it imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt2xla.config import (
    MODEL_HELP,
    PRECISION_ALIASES,
    TOKENIZER_HELP,
    Precision,
    TorchConfig,
    TrainConfig,
    XlaConfig,
    option,
    paths,
    require_at_least,
)
from gpt2xla.errors import InputError, user_error
from gpt2xla.files import write_whole

if TYPE_CHECKING:
    from gpt2xla.runtime.base import Runtime


MODELS_HELP = (
    "checkpoint folders, FOLDER@best, gpt2 ... gpt2-xl, hub ids, or .safetensors, .pt or llm.c files; folders and files "
    "may be URLs (gs://, s3://, hf://)"
)
VALID_STEPS_HELP = "number of batches of --batch-size, or all: each token of the split once"
MMLU_DATA_HELP = (
    "folder of MMLU: a download of cais/mmlu, or the authors' data.tar unpacked (default: fetched from the hub)"
)
SHOTS_HELP = "examples before each question, at most 5: none is lm-evaluation-harness's default, 5 the paper's"
SUBJECTS_HELP = "subjects or groups of MMLU to ask (default: all 57)"
OUTPUT_HELP = "also write the table to this path + .md, and full precision to + .json (default: only print it)"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation"""

    device: Literal["auto", "cpu", "cuda", "mps", "xla"] = option(
        "auto", "auto: cuda, else mps, else cpu, several of them under torchrun; xla: all XLA devices of this host"
    )
    batch_size: int = option(32, "sequences per batch, over all devices together")
    mixed_precision: Precision = option(
        "none",
        "compute type; none: fp32, whose figures are comparable between devices; auto: the device's default for training",
        aliases=PRECISION_ALIASES,
    )

    def train_config(self, valid_steps: int | Literal["all"] = "all") -> TrainConfig:
        """Return the training options that evaluation reads. Raises InputError."""
        require_at_least(1, self, "batch_size")
        train = TrainConfig(
            eval_batch_size=self.batch_size, mixed_precision=self.mixed_precision, valid_steps=valid_steps
        )
        train.check()
        return train


@dataclass(frozen=True, kw_only=True)
class OneModelConfig(EvalConfig):
    """Evaluation of one model"""

    model: str = option(MISSING, MODEL_HELP, is_path=True, check=paths.check_model)
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP} (default: the model's own)", is_path=True, check=paths.check_tokenizer
    )


def open_runtime(device: str, train: TrainConfig) -> Runtime:
    """Open the runtime of the --device. Raises InputError if there is no such device."""
    if device != "xla":
        from gpt2xla.runtime.torch.runtime import TorchRuntime

        return TorchRuntime(TorchConfig(), train, device)
    from gpt2xla.runtime.xla.environment import importing_torch_xla, prepare

    prepare(os.environ)
    with importing_torch_xla():
        from gpt2xla.runtime.xla.spmd import SpmdRuntime
    return SpmdRuntime(XlaConfig(spmd=True), train)


def machine(runtime: Runtime) -> dict[str, str]:
    """Return what a table says about the devices that measured."""
    from gpt2xla.runtime.precision import label

    return {"devices": runtime.description, "precision": label(runtime.precision.name)}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown: text in the first column, numbers in the others."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


class TableFiles:
    """The files that --output asks for: none without it. Raises InputError if they cannot be."""

    def __init__(self, output: str | None) -> None:
        self._output = output
        self.files = [] if output is None else [Path(f"{output}{suffix}") for suffix in (".md", ".json")]
        if output is None:
            return
        if not Path(output).name or not self.files[0].parent.is_dir() or any(file.is_dir() for file in self.files):
            raise InputError(f"--output {output!r}: name files in an existing folder, without .md and .json")
        if not os.access(folder := self.files[0].parent, os.W_OK):
            raise InputError(f"--output {output!r}: files cannot be written in {folder}; choose another folder")

    def write(self, markdown: str, values: dict[str, Any]) -> None:
        if self.files:
            with user_error(f"--output {self._output}"):
                write_whole(self.files[0], markdown)
                write_whole(self.files[1], json.dumps(values, indent=2) + "\n")
