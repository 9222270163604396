"""Text -> a byte-level BPE tokenizer: `python scripts/train_tokenizer.py --input books/ --output-dir my-tokenizer`."""

from __future__ import annotations

import itertools
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2xla.cli import parse_options
from gpt2xla.config import option, paths, require_at_least
from gpt2xla.data.documents.reading_options import (
    COLUMN_HELP,
    EXCLUDE_HELP,
    FORMAT_HELP,
    INPUT_HELP,
    SPLIT_HELP,
    TEXT_SUFFIXES,
    Format,
    SplitBy,
)
from gpt2xla.errors import InputError, counted, user_error

if TYPE_CHECKING:  # --help must not wait for pyarrow
    from gpt2xla.data.documents.corpus import Part
    from gpt2xla.data.preparation.tokenizer_quality import HeldOut
    from gpt2xla.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer training"""

    output_dir: str = option(
        MISSING, "folder for tokenizer.json, which transformers loads", is_path=True, check=paths.check_local
    )
    input: tuple[str, ...] = option((), INPUT_HELP, is_path=True)
    dataset: str | None = option(
        None, "instead of --input: a data set's name on the hub, or a local folder of one", is_path=True
    )
    config: str | None = option(None, "configuration of the data set")
    split: str = option("train", "split of the data set")
    text_column: str = option("text", COLUMN_HELP)
    streaming: bool = option(False, "remove each file of the data set after it was read")
    max_documents: int | None = option(None, "stop after this many documents (default: take all)")
    vocab_size: int = option(32_000, "number of ids, special tokens included")
    min_frequency: int = option(2, "how often a pair must occur to be merged")
    special_tokens: tuple[str, ...] = option(
        (), "tokens whose ids follow that of <|endoftext|>, which comes after the merges"
    )
    suffixes: tuple[str, ...] = option(TEXT_SUFFIXES, "endings of the files to take from --input's folders")
    exclude: tuple[str, ...] = option((), EXCLUDE_HELP)
    split_by: SplitBy | None = option(None, f"{SPLIT_HELP} (default: file; line on the hub, as datasets reads it)")
    format: Format = option("auto", FORMAT_HELP)

    def check(self) -> None:
        """Raise InputError if options do not fit together or are out of range."""
        if not self.output_dir:
            raise InputError("--output-dir is empty; name a folder")
        if bool(self.input) == bool(self.dataset):
            raise InputError("give either --input or --dataset")
        least = 257 + len(self.special_tokens)
        if self.vocab_size < least:
            raise InputError(f"--vocab-size {self.vocab_size}: 256 bytes and the special tokens need at least {least}")
        require_at_least(1, self, "max_documents")
        if Path(self.output_dir, "tokenizer.json").exists():
            raise InputError(
                f"--output-dir {self.output_dir}: holds a tokenizer already; remove it or choose another folder"
            )


def main() -> None:
    options = parse_options(TokenizerConfig, "Train a byte-level byte-pair tokenizer, as GPT-2's is.")
    options.check()
    from gpt2xla.data.documents.corpus import documents_of
    from gpt2xla.data.preparation.tokenizer_quality import HeldOut
    from gpt2xla.data.tokenizer import train_bpe

    output_dir, held_out = Path(options.output_dir), HeldOut()
    documents = held_out.others(itertools.islice(documents_of(corpus(options)), options.max_documents))
    if (first := next(documents, None)) is None:
        raise InputError(f"{'--dataset' if options.dataset else '--input'}: it holds no text; give other files")
    documents = itertools.chain([first], documents)
    tokenizer = train_bpe(documents, output_dir.name, options.vocab_size, options.min_frequency, options.special_tokens)
    with user_error(f"--output-dir {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output_dir)
    fewer = " (fewer than requested: no more pairs of the text occur often enough)"
    print(f"{output_dir}: {tokenizer.vocab_size:,} ids{fewer if tokenizer.vocab_size < options.vocab_size else ''}")
    report_compression(tokenizer, held_out)


def corpus(options: TokenizerConfig) -> list[Part]:
    from gpt2xla.data.documents.corpus import local_parts
    from gpt2xla.data.preparation.hub import dataset_parts
    from gpt2xla.data.preparation.options import HubConfig

    if options.dataset:
        return dataset_parts(
            HubConfig(
                dataset=options.dataset, config=options.config, split=options.split, text_column=options.text_column,
                streaming=options.streaming, split_by=options.split_by, format=options.format,
            )
        )  # fmt: skip
    return local_parts(
        options.input, suffixes=options.suffixes, exclude=options.exclude, column=options.text_column,
        split_by=options.split_by or "file", format=options.format,
    )  # fmt: skip


def report_compression(tokenizer: Tokenizer, held_out: HeldOut) -> None:
    from gpt2xla.data.tokenizer import load_tokenizer

    if not held_out.documents:
        print(
            "bytes per token: not measured, as only each 100th document is held out, and there are fewer "
            "(--split-by line makes more of them)"
        )
        return
    size = f"{counted(len(held_out.documents), 'held-out document')}, {held_out.bytes / 1e6:.2f} MB"
    print(f"bytes per token on {size}: {held_out.bytes_per_token(tokenizer):.3f}")
    try:
        print(f"the same by gpt2: {held_out.bytes_per_token(load_tokenizer('gpt2')):.3f}")
    except InputError:
        print("not compared with gpt2: its encoding is neither in TIKTOKEN_CACHE_DIR nor can it be downloaded")
