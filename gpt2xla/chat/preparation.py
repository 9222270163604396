"""From conversations to a prepared data set: `train/` and `test/`, each with rows, masks, manifest and tokenizer.

All of it depends on the conversations, the tokenizer, the template and the options only. Until it is complete it lies in
`.partial`, which a later preparation replaces. Memory holds every conversation, at 3 bytes a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2xla.chat.options import ChatConfig
from gpt2xla.chat.sources import Source, find_sources, samples_of
from gpt2xla.chat.template import ChatTemplate
from gpt2xla.data.documents.corpus import Split
from gpt2xla.data.preparation.chance import uniform
from gpt2xla.data.preparation.output_bucket import output_of
from gpt2xla.data.preparation.output_folder import OutputFolder, prepare_at_once
from gpt2xla.data.preparation.rows import Sample, write_rows
from gpt2xla.data.shards import Manifest
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.errors import InputError, counted

_DECISIVE = (
    "format", "chat_template", "add_special_tokens", "system", "loss_on", "seq_length", "too_long", "test_fraction", "seed",
    "shard_size",
)  # fmt: skip


def prepare(config: ChatConfig, say: Callable[[str], None] = print) -> dict[Split, Manifest]:
    """Write conversations into `output_dir/train` and `output_dir/test` as rows of `seq_length` tokens, and return the
    manifests by split. `say` receives notes, and a line for each source and split.

    A seeded shuffle orders the conversations. Its first `test_fraction` go to test/, at least one of them.

    Raises:
        InputError: a record is no conversation, template and tokenizer do not fit, too little is left, or the output holds
            something else.
        RunFailed: the disk is full, or the hub does not answer.
    """
    config.check()
    output = output_of(config.output_dir, config.scratch_dir, say)
    tokenizer, template = _fitted(config, say)
    sources = find_sources(config, say)
    files = [file for source in sources for file in source.files]
    settings: dict[str, Any] = {name: getattr(config, name) for name in _DECISIVE}
    settings |= {"tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.sha256}
    settings["chat_template_sha256"] = hashlib.sha256(template.source.encode()).hexdigest()

    def write(partial: Path) -> None:
        for split, samples in _samples(sources, tokenizer, template, config, say).items():
            _write(partial / split, samples, tokenizer, template, config, output, say)

    return prepare_at_once(output, settings, files, write, say)


def _fitted(config: ChatConfig, say: Callable[[str], None]) -> tuple[Tokenizer, ChatTemplate]:
    """Return the tokenizer with the template, and its special tokens if these are to be added, and the template."""
    tokenizer, template = load_tokenizer(config.tokenizer), ChatTemplate.named(config.chat_template)
    if config.add_special_tokens and (missing := template.missing_tokens(tokenizer)):
        ids = [tokenizer.vocab_size + number for number in range(len(missing))]
        added = ", ".join(f"{token} = {id}" for token, id in zip(missing, ids, strict=True))
        say(f"added to tokenizer {tokenizer.name}: {added}; a model without them is trained with --resize-vocab")
        tokenizer = tokenizer.with_special_tokens(missing)
    template = template.fitted(tokenizer)
    return tokenizer.with_chat_template(template.source), template


def _samples(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config: ChatConfig,
    say: Callable[[str], None],
) -> dict[Split, list[Sample]]:
    """Return the samples of both splits, in their order."""
    samples: list[Sample] = []
    first = 0
    for source in sources:
        kept, tally = samples_of(source, tokenizer, template, config, first)
        say(tally.line(source.name, kept))
        first += tally.read
        samples += kept
    if len(samples) < 2:
        fix = "give more conversations, or see above why some were left out"
        raise InputError(f"train/ and test/ need a conversation each, and {len(samples)} is left; {fix}")
    if divided := sum(_is_divided(sample, tokenizer.eot_id) for sample in samples):
        effect = "with --document-mask, the default for such rows, later answers there do not see the turns before"
        fix = "train with --no-document-mask, or take a template with another token for it, such as chatml"
        say(f"note: end-of-text ends earlier answers in {counted(divided, 'conversation')}; {effect}: {fix}")
    order = np.argsort(uniform(config.seed, 0, len(samples)), kind="stable").tolist()
    tests = min(max(1, round(config.test_fraction * len(samples))), len(samples) - 1)
    return {"train": [samples[i] for i in order[tests:]], "test": [samples[i] for i in order[:tests]]}


def _is_divided(sample: Sample, eot_id: int | None) -> bool:
    """Tell whether an end of text stands before a token that is trained on, other than at the start."""
    last = int(np.flatnonzero(sample.trained)[-1])
    return bool((sample.ids[1:last] == eot_id).any())


def _write(
    folder: Path,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config: ChatConfig,
    output: OutputFolder,
    say: Callable[[str], None],
) -> None:
    manifest = write_rows(
        folder, samples, tokenizer, row_length=config.seq_length, shard_size=config.shard_size,
        chat_template=template.source,
    )  # fmt: skip
    rows, tokens = manifest.tokens // config.seq_length, sum(len(sample.ids) for sample in samples)
    say(
        f"{output.of(folder.name)}: {counted(rows, 'row')} of {config.seq_length:,} tokens, "
        f"{tokens / manifest.tokens:.1%} full, with {counted(len(samples), 'conversation')}; "
        f"{counted(manifest.trained_tokens or 0, 'token')} trained on"
    )
