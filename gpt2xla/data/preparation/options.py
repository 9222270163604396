"""Options of the preparation. Imports nothing heavy: --help must not wait for pyarrow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from gpt2xla.config import TOKENIZER_HELP, option, paths, require_at_least
from gpt2xla.data.documents.reading_options import COLUMN_HELP, FORMAT_HELP, SPLIT_HELP, Format, SplitBy
from gpt2xla.errors import InputError

OUTPUT_HELP = "folder or URL (gs://, s3://, hf://) to make train/ and test/ in"
SCRATCH_DIR = "~/.cache/gpt2xla/preparations"
SCRATCH_HELP = "where shards for a URL wait to be sent"
_MOST_TOKENS = 10**12  # per shard


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Preparation"""

    output_dir: str = option("./data", OUTPUT_HELP, is_path=True)
    scratch_dir: str = option(SCRATCH_DIR, SCRATCH_HELP, is_path=True, check=paths.check_local)
    tokenizer: str = option("gpt2", TOKENIZER_HELP, is_path=True, check=paths.check_tokenizer)
    test_fraction: float | None = option(
        None,
        "share of the documents that goes to test/, at least one document (default: 0.01, and as much of the end of the "
        "text as makes 20,000 tokens and 1% of them all)",
    )
    test_tokens: int | None = option(None, "largest number of tokens in test/ (default: one shard)")
    max_tokens: int | None = option(None, "stop after the document that reaches this many (default: take all)")
    shard_size: int = option(100_000_000, "tokens per shard")
    seed: int = option(1061109567, "seed that decides which documents go to test/")
    num_workers: int = option(max(1, os.cpu_count() or 1), "number of threads that encode")
    special_tokens_in_text: Literal["as-text", "as-ids", "refuse"] = option(
        "as-text",
        "what to do with special tokens, such as <|user|> or <|endoftext|>, that a document spells: as-text encodes the "
        "letters and counts them, as-ids encodes the tokens, as transformers does, refuse stops there",
    )

    def check(self) -> None:
        """Raise InputError if a value is out of range."""
        if not self.output_dir:
            raise InputError("--output-dir is empty; name a folder")
        if self.test_fraction is not None and not 0 <= self.test_fraction < 1:
            raise InputError(f"--test-fraction {self.test_fraction}: choose a share of at least 0 and below 1")
        require_at_least(1, self, "test_tokens", "max_tokens", "shard_size", "num_workers")
        if self.shard_size > _MOST_TOKENS:
            raise InputError(f"--shard-size {self.shard_size}: choose at most {_MOST_TOKENS:,}")


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Data set"""

    dataset: str = option("HuggingFaceFW/fineweb", "name on the hub, or a local folder", is_path=True)
    config: str | None = option(None, "configuration of the data set; of a local folder, one that its README.md lists")
    split: str = option("train", "split to take")
    test_split: str | None = option(None, "split that becomes test/ (default: documents are drawn from --split)")
    text_column: str = option("text", COLUMN_HELP)
    split_by: SplitBy | None = option(None, f"{SPLIT_HELP} (default: file; line on the hub, as datasets reads it)")
    format: Format = option("auto", FORMAT_HELP)
    streaming: bool = option(False, "remove each file after it was read, instead of keeping it in the hub's cache")
    cache_dir: str | None = option(None, "where files are kept (default: the hub's cache)", is_path=True)
    retries: int = option(8, "how often to try again when the hub fails, after 1, 2, 4, ... seconds, at most 60")
