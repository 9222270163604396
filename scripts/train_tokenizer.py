#!/usr/bin/env python
"""Text files -> a byte-level BPE tokenizer: `python scripts/train_tokenizer.py --input books/ --output-dir my-tokenizer`."""

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.exits import exit_code


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer training"""

    input: tuple[str, ...] = option(MISSING, "text files, or folders to search for them")
    output_dir: str = option(MISSING, "folder for tokenizer.json, which transformers loads")
    vocab_size: int = option(32_000, "number of ids, end-of-text included")
    min_frequency: int = option(2, "how often a pair must occur to be merged")
    suffixes: tuple[str, ...] = option((".txt", ".md"), "endings of the files to take from folders")
    exclude: tuple[str, ...] = option((), "names of folders to leave out")


def main() -> None:
    options = parse_options(TokenizerConfig, "Train a byte-level byte-pair tokenizer, as GPT-2's is.")
    from gpt2xla.data.corpus import documents_of, local_parts
    from gpt2xla.errors import InputError, blaming
    from gpt2xla.tokenizer import train_bpe

    if options.vocab_size < 257:
        raise InputError(f"--vocab-size {options.vocab_size}: the 256 bytes and end-of-text need at least 257")
    output_dir = Path(options.output_dir)
    if (output_dir / "tokenizer.json").exists():
        raise InputError(f"--output-dir {output_dir}: holds a tokenizer already; remove it or choose another folder")
    documents = documents_of(local_parts(options.input, suffixes=options.suffixes, exclude=options.exclude))
    tokenizer = train_bpe(documents, output_dir.name, options.vocab_size, options.min_frequency)
    with blaming(f"--output-dir {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output_dir)
    fewer = " (fewer than asked: the text has no more pairs that occur often enough)"
    print(f"{output_dir}: {tokenizer.vocab_size:,} ids{fewer if tokenizer.vocab_size < options.vocab_size else ''}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
