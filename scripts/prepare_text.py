#!/usr/bin/env python
"""Text files -> token shards: `python scripts/prepare_text.py --input books/ --output-dir data/books`."""

import sys
import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.exits import exit_code


@dataclass(frozen=True)
class PrepareConfig:
    """Text preparation"""

    input: tuple[str, ...] = option(MISSING, "text files, or folders to search for them")
    output_dir: str = option(MISSING, "folder to make train/ and test/ in")
    tokenizer: str = option("gpt2", "a tiktoken name, 'bytes', or a tokenizer.json or its folder")
    suffixes: tuple[str, ...] = option((".txt", ".md"), "endings of the files to take from folders")
    exclude: tuple[str, ...] = option((), "names of folders to leave out")
    split_by: Literal["file", "blank-lines", "line"] = option("file", "what a document is")
    test_fraction: float = option(0.01, "share of the documents that goes to test/")
    shard_size: int = option(100_000_000, "tokens per shard")
    seed: int = option(1061109567, "decides which documents go to test/")


def main() -> None:
    options = parse_options(PrepareConfig, "Tokenise text files into train/ and test/ shards.")
    from gpt2xla.data.writer import prepare, read_documents
    from gpt2xla.tokenizer import load_tokenizer

    started = time.perf_counter()
    documents = read_documents([Path(p) for p in options.input], options.suffixes, options.exclude, options.split_by)
    manifests = prepare(
        documents,
        load_tokenizer(options.tokenizer),
        Path(options.output_dir),
        seed=options.seed,
        test_fraction=options.test_fraction,
        shard_size=options.shard_size,
    )
    seconds = time.perf_counter() - started
    for split, manifest in manifests.items():
        print(
            f"{Path(options.output_dir) / split}: {manifest.tokens:,} tokens in {len(manifest.shards)} shards, from "
            f"{manifest.documents:,} documents, {manifest.bytes / manifest.tokens:.2f} bytes per token"
        )
    print(f"{sum(m.bytes for m in manifests.values()) / 1e6:,.1f} MB of text in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(exit_code(main))
