#!/usr/bin/env python
"""Text files -> token shards: `python scripts/prepare_text.py --input books/ --output-dir data/books`."""

import sys
from dataclasses import MISSING, dataclass
from typing import Literal

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.data.corpus import TEXT_SUFFIXES, local_parts
from gpt2xla.data.prepare import PrepareConfig, prepare_and_report
from gpt2xla.exits import exit_code


@dataclass(frozen=True, kw_only=True)
class TextConfig(PrepareConfig):
    """Text preparation"""

    input: tuple[str, ...] = option(
        MISSING, "files (text, parquet, jsonl, and .gz or .zst of these), or folders of them"
    )
    output_dir: str = option(MISSING, "folder to make train/ and test/ in", is_path=True)
    suffixes: tuple[str, ...] = option(TEXT_SUFFIXES, "endings of the files to take from folders")
    exclude: tuple[str, ...] = option((), "names of files and folders to leave out")
    split_by: Literal["file", "blank-lines", "line"] = option("file", "what a document is in a text file")
    text_column: str = option("text", "column or field that holds the text in parquet and jsonl files")


def main() -> None:
    options = parse_options(TextConfig, "Tokenise text files into train/ and test/ shards.")
    prepare_and_report(
        lambda: local_parts(
            options.input,
            suffixes=options.suffixes,
            exclude=options.exclude,
            column=options.text_column,
            split_by=options.split_by,
        ),
        options,
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
