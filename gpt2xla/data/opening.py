"""From the options of a run to its data: folders opened, checked, and found to go together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt2xla.config import RunConfig
from gpt2xla.data.mixture import Mixture, parse_weights
from gpt2xla.data.remote import Cache
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.windows import Windows
from gpt2xla.errors import InputError


def open_training(config: RunConfig) -> tuple[list[Windows], Mixture]:
    """The data sets of --train-dir and how they are mixed. Raises InputError."""
    folders, weights = parse_weights("--train-dir", config.data.train_dir)
    sets = [_open(config, folder, "--train-dir") for folder in folders]
    _check_room(config, [windows.stream for windows in sets if windows.stream.is_remote])
    return sets, Mixture.of(weights)


def open_validation(config: RunConfig) -> Windows:
    """Raises InputError."""
    return _open(config, config.data.valid_dir, "--valid-dir")


def check_same_tokenizer(sets: Sequence[Windows]) -> None:
    """Raises InputError where manifests say that data sets were made with different tokenizers."""
    known = [(w.stream, w.stream.manifest) for w in sets if w.stream.manifest]
    for stream, manifest in known[1:]:
        first_stream, first = known[0]
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise InputError(
                f"{stream.option} {stream.name} was made with another tokenizer ({manifest.tokenizer}) than "
                f"{first_stream.option} {first_stream.name} ({first.tokenizer}); prepare both with one"
            )


def _open(config: RunConfig, folder: str, option: str) -> Windows:
    stream = TokenStream(folder, option, _cache(config))
    windows = Windows(stream, config.model.seq_length, config.model.real_vocab_size)
    if config.data.verify_data:
        stream.verify()
    return windows


def _check_room(config: RunConfig, remote: Sequence[TokenStream]) -> None:
    if config.data.shuffle:
        needed, why = sum(stream.bytes for stream in remote), "--shuffle reads all over the data"
    else:
        needed = sum(2 * stream.largest_shard_bytes for stream in remote)
        why = "the shard that is read and the next one take that much"
    if 0 < _cache(config).limit < needed:
        raise InputError(
            f"--data-cache-gb {config.data.data_cache_gb:g} is too small for --train-dir, shards would be fetched again and "
            f"again: {why}; use at least {1.01 * needed / 1e9:.2g}"
        )


def _cache(config: RunConfig) -> Cache:
    return Cache(Path(config.data.data_cache), int(config.data.data_cache_gb * 1e9))
