"""In what a new run's model may differ from the checkpoint that it starts from: more ids, padding, fewer positions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gpt2xla.checkpoint.formats.stored_weights import StoredWeights
from gpt2xla.config import ModelConfig, RunConfig
from gpt2xla.config.paths import parse_weights
from gpt2xla.data.opening import aligned_size, ids_of, tokenizer_of_data
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.data.tokenizer_folder import has_tokenizer, model_folder
from gpt2xla.errors import InputError, counted


def resized(
    config: RunConfig, saved: ModelConfig, weights: StoredWeights, source: Path
) -> tuple[ModelConfig, StoredWeights, list[str]]:
    """Return the model of `source` and its weights as the user asked for them, and notes: with rows for the new ids of
    another tokenizer, its vocabulary padded and its positions cut. Without new ids, the model stays the same function for
    the ids that it had and the sequences that it can still read. Raises InputError for sizes that cannot be."""
    notes = []
    if config.general.resize_vocab:
        saved, weights, note = _with_new_ids(config, saved, weights, source)
        notes.append(note)
    asked, tokens = config.model, saved.real_vocab_size
    if "vocab_size" in config.given and asked.vocab_size != saved.vocab_size:
        if asked.vocab_size < tokens:
            aligned = aligned_size(tokens)
            raise InputError(
                f"--vocab-size {asked.vocab_size} is less than the {tokens} ids of {source}"
                f"{' with --resize-vocab' if config.general.resize_vocab else ''}; use {tokens}, or {aligned} for aligned "
                "shapes"
            )
        padding = asked.vocab_size - tokens
        saved = dataclasses.replace(saved, vocab_size=asked.vocab_size, vocab_padding=padding)
        if padding:
            notes.append(f"vocabulary: {tokens:,} ids and {padding} of padding, which are never predicted")
    if "seq_length" in config.given and asked.seq_length != saved.seq_length:
        if asked.seq_length > saved.seq_length:
            raise InputError(
                f"--seq-length {asked.seq_length} is more than the {saved.seq_length} positions that {source} has; use at "
                f"most {saved.seq_length}"
            )
        notes.append(f"positions: the first {asked.seq_length} of {saved.seq_length}")
        saved = dataclasses.replace(saved, seq_length=asked.seq_length)
    saved.check()
    return saved, weights, notes


def check_ids_of_data(config: RunConfig, saved: ModelConfig, source: Path, *, is_resumed: bool) -> None:
    """Raise InputError if a tokenizer of the training data has more ids than the model of `source`."""
    new_run = f"begin a new run in another --checkpoints-dir, with --from-checkpoint {source} and --resize-vocab"
    fix = new_run if is_resumed else "give the new ones rows with --resize-vocab"
    for folder in parse_weights("--train-dir", config.data.train_dir)[0]:
        if (ids := ids_of(config, folder)) > saved.real_vocab_size:
            raise InputError(
                f"--train-dir {folder} was made with a tokenizer of {ids} ids, but {source} has {saved.real_vocab_size}; "
                f"{fix}, or prepare the data with the model's tokenizer"
            )


def _with_new_ids(
    config: RunConfig, saved: ModelConfig, weights: StoredWeights, source: Path
) -> tuple[ModelConfig, StoredWeights, str]:
    """Return the model with a row for each id of --tokenizer or else the data's tokenizer, and padding behind that makes a
    multiple of 128. A row without a token in the model's own tokenizer begins as the mean of those with one."""
    new, folder = tokenizer_of_data(config), model_folder(source)
    if not has_tokenizer(folder):
        raise InputError(
            f"--resize-vocab: {source} has no tokenizer, so nothing says which tokens its rows stand for; write it as a "
            "folder with one: scripts/convert_checkpoint.py --tokenizer"
        )
    old = load_tokenizer(str(folder))
    known = min(old.vocab_size, saved.real_vocab_size)  # a [PAD] that was added to the tokenizer alone has no row
    _check_extends(old, new, known, source)
    ids = new.vocab_size
    if ids <= known:
        return saved, weights, f"vocabulary: nothing to do for --resize-vocab: {source} has all {ids:,} ids already"
    size = aligned_size(ids)
    model = dataclasses.replace(saved, vocab_size=size, vocab_padding=size - ids)
    note = (
        f"vocabulary: {known:,} ids and {counted(ids - known, 'new one')}, whose rows begin as the mean of the others; "
        f"padded to {size:,}"
    )
    return model, weights.with_mean_rows(known, ids), note


def _check_extends(old: Tokenizer, new: Tokenizer, known: int, source: Path) -> None:
    """Raise InputError unless the first `known` ids of `old` mean the same in `new`."""
    ours, theirs = (
        {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
        for tokenizer in (old, new)
    )
    for i, token in sorted(ours.items()):
        if i < known and theirs.get(i) != token:
            means = f"is {theirs[i]!r}" if i in theirs else "does not exist"
            raise InputError(
                f"--resize-vocab: id {i} is {token!r} in the tokenizer of {source}, but {means} in {new.name}; use a "
                "tokenizer that only adds tokens to the model's"
            )
