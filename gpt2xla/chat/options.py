"""Options of `prepare_chat.py`. Imports nothing heavy: --help must not wait for pyarrow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpt2xla.chat.conversations import LossOn
from gpt2xla.chat.formats import ChatFormat
from gpt2xla.config import TOKENIZER_HELP, option, paths, require_at_least
from gpt2xla.data.documents.reading_options import EXCLUDE_HELP
from gpt2xla.data.preparation.options import OUTPUT_HELP, SCRATCH_DIR, SCRATCH_HELP
from gpt2xla.errors import InputError

_SHARE = "NAME=0.5 takes that share of its conversations, drawn by --seed; NAME alone takes all"


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Chat preparation"""

    input: tuple[str, ...] = option(
        (), f"files or folders of JSON lines, JSON, parquet or Arrow, also compressed; {_SHARE}", is_path=True
    )
    dataset: tuple[str, ...] = option(
        (), f"data sets by name on the hub, or local folders of splits; {_SHARE}", is_path=True
    )
    config: str | None = option(None, "configuration of every --dataset (default: its only one)")
    split: str = option("train", "split to take of every --dataset")
    cache_dir: str | None = option(None, "where files of the hub are kept (default: the hub's cache)", is_path=True)
    exclude: tuple[str, ...] = option((), EXCLUDE_HELP)
    format: ChatFormat = option(
        "auto",
        "format of the records: messages (role, content), sharegpt (conversations of from, value), alpaca (instruction, "
        "input, output), dolly (instruction, context, response), prompt-completion; auto: as each record's keys tell",
    )
    output_dir: str = option("./chat", OUTPUT_HELP, is_path=True)
    scratch_dir: str = option(SCRATCH_DIR, SCRATCH_HELP, is_path=True, check=paths.check_local)
    tokenizer: str = option("gpt2", TOKENIZER_HELP, is_path=True, check=paths.check_tokenizer)
    add_special_tokens: bool = option(
        False,
        "add the special tokens that the template writes and the tokenizer lacks, after its last id; a model that has no "
        "rows for them is then trained with --resize-vocab",
    )
    chat_template: str = option(
        "chatml",
        "chatml, alpaca, or a file of Jinja text with {% generation %} around answers and their end",
        is_path=True,
    )
    system: str | None = option(None, "system message for conversations that have none")
    loss_on: LossOn = option("all-answers", "which of the assistant's messages are trained on")
    seq_length: int = option(1024, "tokens per row: the --seq-length of the training")
    too_long: Literal["drop", "raise"] = option(
        "drop", "a conversation that is longer than a row is left out and counted, or stops the preparation"
    )
    test_fraction: float = option(0.1, "share of the conversations that goes to test/, at least one")
    seed: int = option(1061109567, "seed that decides which conversations go to test/, and their order")
    shard_size: int = option(100_000_000, "tokens per shard")

    def check(self) -> None:
        """Raise InputError if a value is out of range."""
        if not self.input and not self.dataset:
            raise InputError("nothing to read; name files or folders with --input, or data sets with --dataset")
        if not self.output_dir:
            raise InputError("--output-dir is empty; name a folder")
        if not 0 < self.test_fraction < 1:
            raise InputError(f"--test-fraction {self.test_fraction}: choose a share above 0 and below 1")
        if self.system is not None and not self.system.strip():
            raise InputError("--system is empty; leave it out, or write what the assistant is to know")
        require_at_least(2, self, "seq_length")
        require_at_least(1, self, "shard_size")
