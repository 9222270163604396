"""From drawings to a prepared data set: `train/` and `test/`, each with rows, masks, manifest and tokenizer.

A first pass makes the pictures and leaves them on disk; a second one sorts them, chooses, and writes tokens. Each drawing
has a key, a hash of its key_id. It decides on the split, on the place among the others, and on which drawings --per-word
takes. So the result depends on the drawings and the options only, neither on the order of the files nor on the number of
workers, and memory does not grow with them. Until it is complete it lies in `.partial`, which a later preparation replaces.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from gpt2xla.data.documents.corpus import InputFile, Split
from gpt2xla.data.preparation.output_bucket import output_of
from gpt2xla.data.preparation.output_folder import OutputFolder, prepare_at_once
from gpt2xla.data.preparation.rows import Sample, write_rows
from gpt2xla.data.shards import MANIFEST, Manifest
from gpt2xla.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from gpt2xla.errors import InputError, counted
from gpt2xla.processes.workers import in_order
from gpt2xla.sketches.collecting import Collected, collect
from gpt2xla.sketches.encoding import Choice, Text, TextEncoder, TokenEncoder, Tokens
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.options import VOCAB_SIZE, SketchesConfig
from gpt2xla.sketches.packed_pictures import Rasteriser
from gpt2xla.sketches.sources import find_files
from gpt2xla.sketches.tokenizer import SPECIAL_TOKENS, check_word, train_tokenizer, with_sketch_tokens

E = TypeVar("E", Tokens, Text)

TEXT_FILE = "sketches.txt"
_AROUND = 6  # tokens of a sketch beside its picture: end-of-text, the four special ones, and a word
_DECISIVE = (
    "per_word", "recognized_only", "size", "stroke_width", "augment", "word_before", "loss_on", "as_text", "seq_length",
    "test_fraction", "seed", "shard_size",
)  # fmt: skip


def prepare(config: SketchesConfig, say: Callable[[str], None] = print) -> dict[Split, Manifest]:
    """Write drawings into `output_dir/train` and `output_dir/test` as rows of `seq_length` tokens, or as text, and return
    the manifests by split: none of text. `say` receives notes, and a line for the input and each split.

    A drawing goes to test/ with probability `test_fraction`. Its altered copies stand in train/ only.

    Raises:
        InputError: a line is no drawing, a word has none, tokenizer and options do not fit, too little is left, or the
            output holds something else.
        RunFailed: the disk is full, a URL does not answer, or a worker was killed.
    """
    config.check()
    output = output_of(config.output_dir, config.scratch_dir, say)
    given = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    for word in config.words:
        check_word(word, _reserved(given), "--words")
    _check_room(_format(config, given, dict.fromkeys(config.words or ("apple",), 1)), config)
    files = find_files(config.input, config.exclude, output.partial / "fetched", say)
    settings: dict[str, Any] = {name: getattr(config, name) for name in _DECISIVE}
    settings |= {"tokenizer": given and given.name, "tokenizer_sha256": given and given.sha256}
    settings |= {"words": sorted(set(config.words)), "vocab_size": None if given else config.vocab_size or VOCAB_SIZE}
    write = partial(_write, config, given, files, output, say)
    return prepare_at_once(output, settings, files, write, say, TEXT_FILE if config.as_text else MANIFEST)


def _write(
    config: SketchesConfig,
    given: Tokenizer | None,
    files: Sequence[InputFile],
    output: OutputFolder,
    say: Callable[[str], None],
    folder: Path,
) -> None:
    """Write both splits into `folder`, and say what they hold."""
    rasteriser = Rasteriser(
        config.size, config.stroke_width, config.augment, config.seed, config.test_fraction, frozenset(config.words),
        config.recognized_only,
    )  # fmt: skip
    collected = collect(
        files, rasteriser, folder / "buckets",
        per_word=config.per_word, reserved=_reserved(given), workers=config.num_workers,
    )  # fmt: skip
    _check_drawings(collected, config, say)
    format = _format(config, given, dict(zip(collected.words, collected.counts, strict=True)))
    say(_described(format, given))
    choose = Choice(config.size, collected.words, collected.limits, config.word_before)
    writing = _Writing(choose, format, config, left_out=collected.left_out)
    reports = {split: writing.write(folder / split, held.files) for split, held in collected.buckets.items()}
    say(f"{counted(collected.read, 'drawing')} read, {writing.drawings:,} kept{_listed(writing.left_out)}")
    for split, report in reports.items():
        say(f"{output.of(split)}: {report}")


def _reserved(given: Tokenizer | None) -> list[str]:
    """Return the tokens that no word may spell."""
    return [END_OF_TEXT, *SPECIAL_TOKENS, *(given.added if given else ())]


def _format(config: SketchesConfig, given: Tokenizer | None, counts: Mapping[str, int]) -> SketchFormat:
    """Return the format of sketches of these words, with the given tokenizer, or one that is made for them."""
    words, size, width = sorted(counts), config.size, config.stroke_width
    if given is not None:
        return SketchFormat.fitted(given, size, words, width)
    tokenizer = train_tokenizer(counts, size, config.vocab_size or VOCAB_SIZE)
    return SketchFormat(with_sketch_tokens(tokenizer, size, words, width), size, words, width)


def _check_room(format: SketchFormat, config: SketchesConfig) -> None:
    """Raise InputError if no sketch fits into a row, as far as that can be known before any is seen."""
    least = format.picture_tokens + _AROUND
    if format.has_pieces and config.seq_length < least and not config.as_text:
        what = f"a sketch of {config.size}x{config.size} pixels takes at least {least} tokens"
        raise InputError(f"--seq-length {config.seq_length}: {what}; raise it, or choose a smaller --size")


def _check_drawings(collected: Collected, config: SketchesConfig, say: Callable[[str], None]) -> None:
    """Raise InputError if a word of --words is not in the data, or too few drawings are left."""
    for word in config.words:
        if word not in collected.seen:
            close = difflib.get_close_matches(word, collected.seen, n=1)
            fix = f"did you mean {close[0]!r}?" if close else "leave it out, or give the file that has them"
            raise InputError(f"--words {word}: no drawing is of it; {fix}")
    if without := sorted(
        {word for word in collected.seen if not config.words or word in config.words} - set(collected.words)
    ):
        say(f"note: no drawing is left of {', '.join(without[:5])}{', ...' if len(without) > 5 else ''}")
    for split, buckets in collected.buckets.items():
        if not buckets.records:
            left = f"{counted(sum(collected.counts), 'drawing')} left of {collected.read:,} read"
            fix = f"change --test-fraction {config.test_fraction:g}, or give more"
            raise InputError(f"{split}/ has no drawing, with {left}{_listed(collected.left_out)}; {fix}")


def _listed(left_out: Counter[str]) -> str:
    return "; left out: " + ", ".join(f"{number:,} {why}" for why, number in left_out.items()) if left_out else ""


def _described(format: SketchFormat, given: Tokenizer | None) -> str:
    """Return a line about the tokenizer."""
    tokenizer, tokens = format.tokenizer, format.picture_tokens
    if given is None:
        whole = sum(len(tokenizer.encode(word)) == 1 for word in format.words)
        return (
            f"tokenizer: {tokenizer.vocab_size:,} ids, {tokens} tokens for each picture; {whole:,} of "
            f"{counted(len(format.words), 'word')} {'is' if len(format.words) == 1 else 'are'} one token"
        )
    ids = {token: tokenizer.backend.token_to_id(token) for token in SPECIAL_TOKENS if token not in given.added}
    if not ids:
        return f"tokenizer {given.name}: {tokenizer.vocab_size:,} ids"
    added = ", ".join(f"{token} = {number}" for token, number in ids.items())
    return f"added to tokenizer {given.name}: {added}; a model without them is trained with --resize-vocab"


@dataclass
class _Writing:
    """Writes splits, and counts what they hold.

    Attributes:
        drawings: how many are written, without their copies.
        left_out: how many are not, by the reason.
    """

    choose: Choice
    format: SketchFormat
    config: SketchesConfig
    drawings: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def write(self, folder: Path, files: Sequence[Path]) -> str:
        """Write the sketches of the buckets `files` into `folder`, and return a report."""
        return (self._write_text if self.config.as_text else self._write_tokens)(folder, files)

    def _write_text(self, folder: Path, files: Sequence[Path]) -> str:
        before = self.drawings
        folder.mkdir()
        with (folder / TEXT_FILE).open("wb") as stream:
            for piece in self._encoded(TextEncoder(self.choose, self.format), folder, files):
                stream.write(piece.text.encode())
            size = stream.tell()
            stream.flush()
            os.fsync(stream.fileno())
        self.format.tokenizer.save(folder)
        return f"{TEXT_FILE} of {size:,} bytes, with {counted(self.drawings - before, 'drawing')}"

    def _write_tokens(self, folder: Path, files: Sequence[Path]) -> str:
        config, before, tokens = self.config, self.drawings, 0

        def samples() -> Iterator[Sample]:
            nonlocal tokens
            encoder = TokenEncoder(self.choose, self.format, config.loss_on, config.seq_length)
            for piece in self._encoded(encoder, folder, files):
                tokens += len(piece.ids)
                yield from piece.samples()

        manifest = write_rows(
            folder, samples(), self.format.tokenizer, row_length=config.seq_length, shard_size=config.shard_size
        )
        rows = manifest.tokens // config.seq_length
        return (
            f"{counted(rows, 'row')} of {config.seq_length:,} tokens, {tokens / manifest.tokens:.1%} full, with "
            f"{counted(self.drawings - before, 'drawing')} in {counted(manifest.documents, 'sketch', 'sketches')}; "
            f"{counted(manifest.trained_tokens or 0, 'token')} trained on"
        )

    def _encoded(self, encoder: Callable[[Path], E], folder: Path, files: Sequence[Path]) -> Iterator[E]:
        before = self.drawings
        pieces = in_order(encoder, ((file,) for file in files), self.config.num_workers)
        for piece in tqdm(pieces, "writing", len(files), unit=" buckets", disable=None):
            self.drawings += piece.drawings
            self.left_out += piece.left_out
            yield piece
        if self.drawings == before:
            too_long = any(why.startswith("longer") for why, number in self.left_out.items() if number)
            fix = "raise --seq-length" if too_long else f"change --test-fraction {self.config.test_fraction:g}"
            raise InputError(f"{folder.name}/ has no drawing{_listed(self.left_out)}; {fix}, or give more drawings")
