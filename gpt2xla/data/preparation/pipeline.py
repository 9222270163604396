"""From a corpus to a prepared data set: `train/` and `test/`, each with shards, manifest and tokenizer.

The tokens depend on corpus, tokenizer and seed only, not on the number of workers or on interruptions. Until all is done,
everything lies in `.partial`, with a record of the progress: a killed preparation resumes from there. Shards for a URL are
sent as they are finished (`output_bucket.py`).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import InitVar, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2xla.data.documents.corpus import Block, Part, Position, Split, blocks
from gpt2xla.data.preparation.encoder import Encoded, Encoder
from gpt2xla.data.preparation.options import PrepareConfig
from gpt2xla.data.preparation.output_bucket import output_of
from gpt2xla.data.preparation.output_folder import OutputFolder, is_prepared
from gpt2xla.data.preparation.record import SPLITS, Record
from gpt2xla.data.preparation.spelled_tokens import SpelledInCorpus
from gpt2xla.data.preparation.splitting import Assigned, Splitter
from gpt2xla.data.preparation.tokenizer_quality import first_loss
from gpt2xla.data.preparation.writer import ShardWriter, Written
from gpt2xla.data.shards import Manifest
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.errors import InputError, counted

# Shards per corpus, for text of 6.7 bytes per token; English has 4.5 with GPT-2's tokenizer.
_LEAST_BYTES_PER_BYTE = 0.3


def prepare_and_report(corpus: Callable[[], Sequence[Part]], config: PrepareConfig) -> None:
    """Prepare the parts that `corpus` finds, and print the sizes of the result. Raises as `prepare` does."""
    config.check()
    output = output_of(config.output_dir, config.scratch_dir, print)  # fails before the corpus is looked for
    started = time.perf_counter()
    manifests = prepare(corpus(), load_tokenizer(config.tokenizer), config)
    seconds = time.perf_counter() - started
    for split, manifest in manifests.items():
        print(
            f"{output.of(split)}: {counted(manifest.tokens, 'token')} in {counted(len(manifest.shards), 'shard')}, from "
            f"{counted(manifest.documents, 'document')}, {manifest.bytes / manifest.tokens:.2f} bytes per token"
        )
    print(f"{sum(manifest.bytes for manifest in manifests.values()) / 1e6:,.1f} MB of text in {seconds:.1f} s")


def prepare(
    parts: Sequence[Part], tokenizer: Tokenizer, config: PrepareConfig, say: Callable[[str], None] = print
) -> dict[Split, Manifest]:
    """Tokenise the documents of `parts` into `output_dir/train` and `output_dir/test`, or resume that.

    A document goes to `test` with probability `test_fraction`, drawn from the seed and the document's number, unless its
    part belongs to one split or `test` would exceed `test_tokens`. If none was drawn, the last one goes there. By default,
    the end of the text tops `test` up to a useful size: see `Splitter`. Each document ends with the tokenizer's end-of-text
    id, if it has one. Memory holds a few blocks of documents. The folders appear under their names only when complete.
    Returns the manifests by split.

    Raises:
        InputError: the output holds something else, or a split is empty in the end.
        RunFailed: the disk is full. What is written is kept, and the same call resumes.
    """
    config.check()
    output = output_of(config.output_dir, config.scratch_dir, say)
    decisive = ("test_fraction", "test_tokens", "max_tokens", "shard_size", "seed", "special_tokens_in_text")
    settings = {"tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.sha256}
    settings |= {name: getattr(config, name) for name in decisive}
    if is_prepared(output, settings, parts, say):
        return output.manifests()
    with output.being_prepared(", which resumes") as folder:
        preparation = _Preparation(parts, tokenizer, config, say, output, folder, settings)
        if preparation.record.position.part < len(parts):
            preparation.run()
        return preparation.finish()


@dataclass
class _Preparation:
    """One run of the pipeline: reads, encodes, draws splits, writes, and saves its progress in `record`."""

    parts: Sequence[Part]
    tokenizer: Tokenizer
    config: PrepareConfig
    say: Callable[[str], None]
    output: OutputFolder
    folder: Path
    settings: InitVar[dict[str, Any]]

    def __post_init__(self, settings: dict[str, Any]) -> None:
        if record := self.output.unfinished():
            record.check(settings, self.parts, self.output.name, complete=False)
            if record.tokens:
                part = min(record.position.part + 1, len(self.parts))
                self.say(f"resuming after {counted(record.tokens, 'token')}, in part {part} of {len(self.parts)}")
            self.output.restore(record, self.tokenizer.dtype, self.config.shard_size)
            self.record, record.settings = record, settings
        else:
            self._check_new()
            self.record = Record(settings, [], Position(0, 0), {split: Written([]) for split in SPLITS})
            self.output.begin(self.record)

    def _check_new(self) -> None:
        """Raise InputError if a new preparation would fail, for all that can be seen before it begins."""
        self.output.refuse_other_splits()
        if self.config.test_fraction == 0 and not any(part.split == "test" for part in self.parts):
            raise InputError("--test-fraction 0 leaves nothing for test/; choose a share above 0")
        if self.config.test_fraction is not None and [part.how for part in self.parts] == ["split by file"]:
            raise InputError(
                f"{self.parts[0].name} is a single document, and train/ and test/ need at least one each; leave "
                "--test-fraction out, so that a part of it becomes test/, or give more files"
            )
        needed = _LEAST_BYTES_PER_BYTE * sum(part.size for part in self.parts)
        if self.config.max_tokens is not None:
            needed = min(needed, 2 * self.config.max_tokens)
        self.output.check_room(needed, self.config.shard_size * self.tokenizer.dtype.itemsize)
        if self.tokenizer.eot_id is None:
            effect = "no border is stored between documents"
            self.say(f"note: tokenizer {self.tokenizer.name} has no end-of-text token: {effect}")

    def run(self) -> None:
        """Continue to the end of the corpus, or to --max-tokens."""
        self.encoder = Encoder(self.tokenizer, self.config.special_tokens_in_text)
        self.spelled = SpelledInCorpus(self.config.special_tokens_in_text, self.record.spelled, self.say)
        self.writers = {split: self._writer(split) for split in SPLITS}
        self.splitter = self._splitter()
        with tqdm(unit=" tokens", unit_scale=True, initial=self.record.tokens, disable=None) as bar:
            for block, encoded in self._encoded():
                encoded, is_limit = self._limited(encoded)
                for assigned in self.splitter.add(block, encoded):
                    self._write(assigned)
                bar.update(self.splitter.train + self.splitter.test - bar.n)
                if is_limit:
                    break
                # Never after the loop, whose end decides on all that was held back.
                if self.output.is_record_due:
                    self._count_parts()
                    self.output.save(self.record, self.writers)
        for assigned in self.splitter.end():
            self._write(assigned)
        self.record.position = Position(len(self.parts), 0)
        for split, writer in self.writers.items():
            if writer.written.tokens == 0:
                why = "give more documents, or change --test-fraction" if self.record.tokens else "there is no text"
                raise InputError(f"the {split} split is empty: {why}")
        self.spelled.end()
        self._count_parts()
        self.output.save_last(self.record, self.writers)

    def _encoded(self) -> Iterator[tuple[Block, Encoded]]:
        """Yield the blocks in order. Threads encode a few of them while the next is read and the previous is written."""
        pending: deque[tuple[Block, Future[Encoded]]] = deque()
        with ThreadPoolExecutor(self.config.num_workers, thread_name_prefix="encode") as pool:
            for number, block in enumerate(blocks(self.parts, self.record.position)):
                if number == 0 and self.encoder.fast and not self.encoder.check(block.texts):
                    self.say("warning: gigatoken gives other ids than the tokenizer, and is not used")
                if number == 0 and (loss := first_loss(self.tokenizer, map(str, block.texts))):
                    snippet, back = loss
                    self.say(f"warning: tokenizer {self.tokenizer.name} loses text: {snippet!r} comes back as {back!r}")
                pending.append((block, pool.submit(self.encoder, block.texts)))
                if len(pending) > self.config.num_workers:
                    block, future = pending.popleft()
                    yield block, future.result()
            for block, future in pending:
                yield block, future.result()

    def _splitter(self) -> Splitter:
        config, splits = self.config, self.record.splits
        return Splitter(
            config.test_fraction, config.test_tokens or config.shard_size, config.seed, self.encoder, self.say,
            documents=sum(written.documents for written in splits.values()), train=splits["train"].tokens,
            test=splits["test"].tokens, is_free=any(part.split is None for part in self.parts),
        )  # fmt: skip

    def _limited(self, encoded: Encoded) -> tuple[Encoded, bool]:
        """Return the documents of the next block up to the one that reaches --max-tokens, and whether one does."""
        limit, before = self.config.max_tokens, self.splitter.train + self.splitter.test
        if limit is None or before + encoded.ends[-1] < limit:
            return encoded, False
        count = int(np.searchsorted(encoded.ends, limit - before)) + 1
        spelled = {number: found for number, found in encoded.spelled.items() if number < count}
        ends = encoded.ends[:count]
        return Encoded(encoded.ids[: ends[-1]], ends, encoded.sizes[:count], spelled), True

    def _write(self, assigned: Assigned) -> None:
        """Write a block and move on in the record."""
        ids, ends, sizes, spelled = assigned.encoded
        self.spelled.add(spelled, self.parts, self.record.position)
        # Between two borders all documents go to the same split.
        borders = [0, *(np.flatnonzero(np.diff(assigned.is_test)) + 1).tolist(), len(ends)]
        for first, end in itertools.pairwise(borders):
            writer = self.writers["test" if assigned.is_test[first] else "train"]
            writer.add(ids[ends[first - 1] if first else 0 : ends[end - 1]], end - first, int(sizes[first:end].sum()))
        self.record.position = assigned.block.after

    def finish(self) -> dict[Split, Manifest]:
        """Write the manifests and give everything its final name; an interruption here does no harm."""
        for split in SPLITS:
            if not self.output.has(split):
                self._writer(split).finish(self.tokenizer)
        return self.output.publish()

    def _writer(self, split: Split) -> ShardWriter:
        return ShardWriter(
            self.folder / split, self.tokenizer.dtype, self.config.shard_size, self.record.splits[split],
            closed=partial(self.output.closed, split),
        )  # fmt: skip

    def _count_parts(self) -> None:
        """Have in the record the parts that were begun."""
        self.record.parts = [(part.name, part.size, part.how) for part in self.parts[: self.record.position.part + 1]]
