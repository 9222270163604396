"""The sources of a chat preparation: each --input and --dataset, its records as samples, and what became of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2xla.chat.conversations import trained_answers, with_system
from gpt2xla.chat.formats import conversation_of
from gpt2xla.chat.options import ChatConfig
from gpt2xla.chat.template import ChatTemplate
from gpt2xla.config.paths import split_weight
from gpt2xla.data.documents.corpus import InputFile, here
from gpt2xla.data.documents.input_files import find
from gpt2xla.data.documents.records import RECORD_SUFFIXES, read_records
from gpt2xla.data.preparation.chance import uniform
from gpt2xla.data.preparation.hub import dataset_parts
from gpt2xla.data.preparation.options import HubConfig
from gpt2xla.data.preparation.rows import Sample
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError, counted, user_error
from gpt2xla.files import file_sha256

_SHARE_DRAWS = 1 << 40  # numbers of these draws begin beyond those of conversations, which decide on splits


@dataclass(frozen=True)
class Source:
    """An --input or --dataset: its files, and which share of its conversations is taken."""

    name: str
    files: Sequence[InputFile]
    share: float


@dataclass
class Tally:
    """What became of a source's records, and of its samples that are kept.

    Attributes:
        dropped: how many were left out, by the reason.
        longest_dropped: tokens and place of the longest that did not fit into a row.
    """

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    longest_dropped: tuple[int, str] = (0, "")

    def line(self, name: str, samples: Sequence[Sample]) -> str:
        """Return the report on a source whose `samples` are kept."""
        tokens, trained = sum(len(s.ids) for s in samples), sum(int(s.trained.sum()) for s in samples)
        kept = f"{name}: {counted(self.read, 'conversation')} read, {len(samples):,} kept"
        if samples:
            longest = max(len(sample.ids) for sample in samples)
            kept += f", the longest {longest:,} tokens, {trained / tokens:.1%} of the tokens trained on"
        left_out = [f"{number:,} {why}" for why, number in self.dropped.items()]
        if self.longest_dropped[0]:
            left_out.append("the longest of {:,} tokens: {}".format(*self.longest_dropped))
        return kept + (f"; left out: {', '.join(left_out)}" if left_out else "")


def find_sources(config: ChatConfig, say: Callable[[str], None]) -> list[Source]:
    """Return the sources that the options name. Raises InputError if one is not there, or named twice, and RunFailed if the
    hub does not answer."""
    sources = []
    for entry in config.input:
        path, share = _share_of("--input", entry)
        with user_error(f"--input {path}"):
            found = [
                InputFile(str(file), file.stat().st_size, partial(here, file), _how(file, share))
                for file in find([path], RECORD_SUFFIXES, config.exclude, "--input", say)
            ]
        sources.append(Source(path, found, share))
    for entry in config.dataset:
        name, share = _share_of("--dataset", entry)
        hub = HubConfig(dataset=name, config=config.config, split=config.split, cache_dir=config.cache_dir)
        parts = [
            InputFile(part.name, part.size, part.opened, _how(Path(part.name), share))
            for part in dataset_parts(hub, say)
        ]
        sources.append(Source(name, parts, share))
    places = Counter(os.path.realpath(file.name) for source in sources for file in source.files)
    for place, times in places.items():
        if times > 1:
            raise InputError(f"--input and --dataset name {place} {times} times; name it once")
    return sources


def _how(file: Path, share: float) -> str:
    """Return what, beside name and size, tells whether a later preparation is of the same. The name of a file on the hub
    ends in its content's hash."""
    return (f"sha256 {file_sha256(file)[:12]}, " if file.is_file() else "") + f"a share of {share:g}"


def _share_of(flag: str, entry: str) -> tuple[str, float]:
    with user_error(f"{flag} {entry}"):
        name, share = (entry, None) if Path(entry).exists() else split_weight(entry)
    if share is not None and not 0 < share <= 1:
        raise InputError(f"{flag} {entry}: choose a share above 0 and at most 1, or leave it out to take all of {name}")
    return name, 1.0 if share is None else share


def samples_of(
    source: Source, tokenizer: Tokenizer, template: ChatTemplate, config: ChatConfig, first: int
) -> tuple[list[Sample], Tally]:
    """Return the samples that are kept of a source, and what became of its records. `first`: how many conversations came
    before it, from which its draws follow. Raises InputError that names file and line of the first wrong record."""
    assert tokenizer.eot_id is not None
    tally, kept = Tally(), []
    for where, record in tqdm(_records(source), unit=" conversations", disable=None):
        tally.read += 1
        try:
            messages = with_system(conversation_of(record, config.format), config.system)
            if any(not messages[answer].content.strip() for answer in trained_answers(messages, config.loss_on)):
                tally.dropped["with an empty answer"] += 1
                continue
            ids, trained = template.encode(tokenizer, messages, config.loss_on)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        trained[:1] = False  # nothing predicts it
        size = sum(len(message.content.encode()) for message in messages)
        sample = Sample(ids, trained, size).begun_with(tokenizer.eot_id)
        if (length := len(sample.ids)) > config.seq_length:
            if config.too_long == "raise":
                fix = "raise --seq-length, shorten or remove it, or leave such out with --too-long drop"
                raise InputError(f"{where}: {length:,} tokens do not fit into --seq-length {config.seq_length}; {fix}")
            tally.dropped[f"longer than {config.seq_length:,} tokens"] += 1
            if length > tally.longest_dropped[0]:
                tally.longest_dropped = length, where
            continue
        kept.append(sample)
    if not tally.read:
        raise InputError(f"{source.name} holds no records; leave it out, or make it again")
    if source.share < 1 and kept:
        draws = uniform(config.seed, _SHARE_DRAWS + first, len(kept))
        chosen = np.sort(np.argsort(draws, kind="stable")[: max(1, round(source.share * len(kept)))]).tolist()
        tally.dropped[f"beyond its share of {source.share:g}"] = len(kept) - len(chosen)
        kept = [kept[number] for number in chosen]
    return kept, tally


def _records(source: Source) -> Iterator[tuple[str, object]]:
    for file in source.files:
        # The name of a file on the hub ends in its content's hash, by which a later preparation recognises it.
        name = file.name if Path(file.name).exists() else file.name.rpartition("@")[0]
        with file.opened() as path:
            yield from read_records(path, name)
