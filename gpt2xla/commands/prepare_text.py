"""Text files -> token shards: `python scripts/prepare_text.py --input books/ --output-dir data/books`."""

from dataclasses import MISSING, dataclass

from gpt2xla.cli import parse_options
from gpt2xla.config import option
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
from gpt2xla.data.preparation.options import OUTPUT_HELP, PrepareConfig


@dataclass(frozen=True, kw_only=True)
class TextConfig(PrepareConfig):
    """Text preparation"""

    input: tuple[str, ...] = option(MISSING, INPUT_HELP, is_path=True)
    output_dir: str = option(MISSING, OUTPUT_HELP, is_path=True)
    suffixes: tuple[str, ...] = option(TEXT_SUFFIXES, "endings of the files to take from folders")
    exclude: tuple[str, ...] = option((), EXCLUDE_HELP)
    split_by: SplitBy = option("file", SPLIT_HELP)
    text_column: str = option("text", COLUMN_HELP)
    format: Format = option("auto", FORMAT_HELP)


def main() -> None:
    options = parse_options(TextConfig, "Tokenise text files into train/ and test/ shards.")
    from gpt2xla.data.documents.corpus import local_parts
    from gpt2xla.data.preparation.pipeline import prepare_and_report

    prepare_and_report(
        lambda: local_parts(
            options.input,
            suffixes=options.suffixes,
            exclude=options.exclude,
            column=options.text_column,
            split_by=options.split_by,
            format=options.format,
        ),
        options,
    )
