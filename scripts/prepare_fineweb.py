#!/usr/bin/env python
"""FineWeb -> token shards: `python scripts/prepare_fineweb.py --output-dir fineweb_10BT`."""

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.exits import exit_code


@dataclass(frozen=True)
class FinewebConfig:
    """FineWeb preparation"""

    output_dir: str = option("./fineweb_10BT", "folder to make train/ and test/ in")
    dataset: str = option("HuggingFaceFW/fineweb", "hub data set, or a local folder, with a column 'text'")
    fineweb_edu: bool = option(False, "take HuggingFaceFW/fineweb-edu")
    name: str | None = option("sample-10BT", "configuration of the data set; ignored for a local folder")
    tokenizer: str = option("gpt2", "a tiktoken name, 'bytes', or a tokenizer.json or its folder")
    max_documents: int | None = option(None, "stop after this many documents (default: all)")
    test_fraction: float = option(0.005, "share of the documents that goes to test/")
    shard_size: int = option(100_000_000, "tokens per shard")
    seed: int = option(1061109567, "decides which documents go to test/")


def main() -> None:
    options = parse_options(FinewebConfig, "Stream a data set from the hub into train/ and test/ shards.")
    from gpt2xla.data.writer import prepare
    from gpt2xla.tokenizer import load_tokenizer

    started = time.perf_counter()
    manifests = prepare(
        documents(options),
        load_tokenizer(options.tokenizer),
        Path(options.output_dir),
        seed=options.seed,
        test_fraction=options.test_fraction,
        shard_size=options.shard_size,
    )
    for split, manifest in manifests.items():
        print(f"{Path(options.output_dir) / split}: {manifest.tokens:,} tokens in {len(manifest.shards)} shards")
    print(f"{sum(m.bytes for m in manifests.values()) / 1e6:,.1f} MB of text in {time.perf_counter() - started:.1f} s")


def documents(options: FinewebConfig) -> Iterator[str]:
    """The texts, streamed: nothing is stored but the shards. Raises InputError if there is no such data set."""
    import datasets

    from gpt2xla.errors import InputError

    dataset = "HuggingFaceFW/fineweb-edu" if options.fineweb_edu else options.dataset
    name = None if Path(dataset).is_dir() else options.name
    try:
        rows = datasets.load_dataset(dataset, name=name, split="train", streaming=True)
        yield from (row["text"] for row in itertools.islice(rows, options.max_documents))
    except KeyError as error:
        raise InputError(f"--dataset {dataset} has no column {error.args[0]!r}") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--dataset {dataset} could not be read ({reason}); check the name and the network") from None


if __name__ == "__main__":
    sys.exit(exit_code(main))
