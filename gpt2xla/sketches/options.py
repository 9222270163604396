"""Options of `prepare_sketches.py`. Imports nothing heavy: --help must not wait for pyarrow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from gpt2xla.config import TOKENIZER_HELP, option, paths, require_at_least
from gpt2xla.data.documents.reading_options import EXCLUDE_HELP
from gpt2xla.data.preparation.options import OUTPUT_HELP, SCRATCH_DIR, SCRATCH_HELP
from gpt2xla.errors import InputError

LossOn = Literal["answer", "word", "all"]
VOCAB_SIZE = 1024
MOST_COPIES = 255
_SIZES = 4, 128
_WIDEST = 4


def _check_tokenizer(flag: str, name: str | None) -> None:
    if name is not None:
        paths.check_tokenizer(flag, name)


@dataclass(frozen=True, kw_only=True)
class SketchesConfig:
    """Sketch preparation"""

    input: tuple[str, ...] = option(
        (),
        "files or folders of ndjson as Quick, Draw! publishes it, raw or simplified, also compressed; or URLs and patterns "
        "of URLs, such as 'gs://quickdraw_dataset/full/simplified/*.ndjson'",
        is_path=True,
    )
    exclude: tuple[str, ...] = option((), EXCLUDE_HELP)
    output_dir: str = option("./sketches", OUTPUT_HELP, is_path=True)
    scratch_dir: str = option(SCRATCH_DIR, SCRATCH_HELP, is_path=True, check=paths.check_local)
    words: tuple[str, ...] = option((), "words to take drawings of (default: all)")
    per_word: int | None = option(None, "most drawings to take of each word, chosen by --seed (default: all)")
    recognized_only: bool = option(False, "leave out drawings that the game did not recognise")
    size: int = option(24, "rows of a picture, and pixels of a row")
    stroke_width: int = option(1, "width of the pen in pixels")
    augment: int = option(0, "further copies of each training drawing, turned, sheared, scaled and shifted a little")
    word_before: float = option(
        0.5,
        "share of the sketches that also begin with their word, for models that draw; 0 only recognises, and with 1 a model "
        "learns to copy the word instead of recognising the picture",
    )
    loss_on: LossOn = option(
        "answer",
        "what is trained on: answer: the picture where the word is before it, and the word after it; word: only the word "
        "after; all: all of a sketch, in which the word is one token among many",
    )
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP} (default: one made for these sketches)", is_path=True, check=_check_tokenizer
    )
    vocab_size: int | None = option(None, f"most ids of a tokenizer made for these sketches (default: {VOCAB_SIZE:,})")
    as_text: bool = option(
        False, "write sketches.txt instead of tokens into train/ and test/, with a blank line between sketches"
    )
    seq_length: int = option(1024, "tokens per row: the --seq-length of the training")
    test_fraction: float = option(0.05, "share of the drawings that goes to test/, chosen by --seed")
    seed: int = option(1061109567, "seed of all that is drawn by chance")
    shard_size: int = option(100_000_000, "tokens per shard")
    num_workers: int = option(max(1, os.cpu_count() or 1), "number of processes that read and draw")

    def check(self) -> None:
        """Raise InputError if a value is out of range."""
        if not self.input:
            raise InputError("nothing to read; name files, folders or URLs with --input")
        if not self.output_dir:
            raise InputError("--output-dir is empty; name a folder")
        least, most = _SIZES
        if not least <= self.size <= most:
            raise InputError(f"--size {self.size}: choose from {least} to {most} pixels")
        if not 1 <= self.stroke_width <= min(_WIDEST, self.size // 4):
            raise InputError(f"--stroke-width {self.stroke_width}: choose from 1 to {min(_WIDEST, self.size // 4)}")
        if not 0 <= self.augment <= MOST_COPIES:
            raise InputError(f"--augment {self.augment}: choose from 0 to {MOST_COPIES} copies")
        if not 0 <= self.word_before <= 1:
            raise InputError(f"--word-before {self.word_before}: choose a share from 0 to 1")
        if not 0 < self.test_fraction < 1:
            raise InputError(f"--test-fraction {self.test_fraction}: choose a share above 0 and below 1")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise InputError(
                "--vocab-size is of a tokenizer made here, but --tokenizer names one; leave one of them out"
            )
        if self.as_text and self.loss_on == "word":
            raise InputError(f"--loss-on {self.loss_on} marks tokens, and --as-text writes none; leave one of them out")
        require_at_least(2, self, "seq_length")
        require_at_least(1, self, "per_word", "shard_size", "num_workers")
