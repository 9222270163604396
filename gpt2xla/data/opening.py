"""From the options of a run to its data: folders opened, checked, and found to fit together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpt2xla.config import RunConfig
from gpt2xla.config.paths import is_url, parse_weights
from gpt2xla.data import tokenizer_folder
from gpt2xla.data.batch_plan import BatchPlan
from gpt2xla.data.mixture import PATTERN, Mixture
from gpt2xla.data.remote import Cache, RemoteFolder
from gpt2xla.data.shards import MANIFEST, Manifest, TokenStream
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer, match_tokenizer
from gpt2xla.data.tokenizer_folder import has_tokenizer, model_folder
from gpt2xla.data.windows import TrainingOrder, Windows, validation_windows
from gpt2xla.errors import InputError

_ALIGNMENT = 128  # of vocabularies: with a multiple of it matrix products are fast
MEASURE = "validation"  # the key in a checkpoint


@dataclass(frozen=True)
class TrainingData:
    """All that a run reads.

    Attributes:
        config: the run's options, in which --document-mask is decided.
        order: which windows of --train-dir each update reads.
        validation: the windows of --valid-dir.
        tokenizer: the one that made both; None if there is none beside them and none was named.
        end_of_text: the id that begins a document, with --document-mask; None without.
    """

    config: RunConfig
    order: TrainingOrder
    validation: Windows
    tokenizer: Tokenizer | None
    end_of_text: int | None = None

    @classmethod
    def open(cls, config: RunConfig, plan: BatchPlan, source: Path | None, rank: int, world_size: int) -> TrainingData:
        """Open the data for the process `rank` of `world_size`.

        Args:
            plan: how many sequences each update reads.
            source: the checkpoint that the run starts from. Without --tokenizer, its tokenizer is used before the shards',
                with --resize-vocab after them.

        Raises InputError if data, tokenizer and options do not fit together.
        """
        sets, mixture = open_training(config)
        validation = open_validation(config)
        config = with_document_mask(config, sets)
        order = _order(config, plan, sets, mixture, rank, world_size)
        # A set of conversations may have more ids than a set of text that is mixed with it.
        by_ids = sorted(sets, key=lambda w: w.stream.manifest.vocab_size if w.stream.manifest else 0, reverse=True)
        folders = [*([source] if source else []), *(windows.stream.folder for windows in by_ids)]
        if config.general.resize_vocab:
            folders = [*folders[1:], *folders[:1]]
        tokenizer = tokenizer_of(config, folders, [*sets, validation])
        if tokenizer and (sketches := tokenizer_folder.sketches_of([windows.stream.folder for windows in sets])):
            tokenizer = tokenizer.with_sketches(sketches)
        return cls(config, order, validation, tokenizer, end_of_text_of(config, tokenizer, [*sets, validation]))

    def in_batches(self, config: RunConfig, plan: BatchPlan) -> TrainingData:
        """Return the same data for the run with another batch."""
        return dataclasses.replace(self, config=config, order=dataclasses.replace(self.order, plan=plan))

    def tokens_after(self, step: int) -> int:
        """Return how many tokens the run has read once `step` updates are made."""
        return self.order.plan.sequences_before(step) * self.config.model.seq_length

    @property
    def notes(self) -> list[str]:
        """Lines for the user about what was found in the folders."""
        return [note for windows in (*self.order.sets, self.validation) for note in windows.stream.notes]

    def position(self) -> dict[str, Any]:
        """What decides which windows a step reads: plain values for the checkpoint."""
        return self._fixed() | self.order.plan.state() | {MEASURE: self.measure()}

    def measure(self) -> str:
        """Return what validation losses are measured on: only those of one measure compare."""
        train = self.config.train
        windows = validation_windows(self.validation, train.eval_batch_size, train.valid_steps)
        within = "" if self.end_of_text is None else f" within documents that begin with {self.end_of_text}"
        return f"{windows} windows of {self.validation.seq_length} from {self.validation.stream.fingerprint}{within}"

    def check_continues(self, saved: dict[str, Any], source: Path) -> None:
        """Raise InputError if the run that saved the `position` `saved` in `source` would lose or repeat data. The sizes of
        updates may change."""
        for option, value in self._fixed().items():
            if saved.get(option, value) != value:
                raise InputError(
                    f"{option} is not what {source} was trained with ({saved[option]}, now {value}): the run would lose or "
                    "repeat data; restore it, or start again with --from-checkpoint and --resume never"
                )

    def _fixed(self) -> dict[str, str | int]:
        """What must stay the same for a resumed run to continue exactly."""
        return {
            "--train-dir": self._fingerprint(),
            "--seq-length": self.config.model.seq_length,
            "--drop-last": sum(order.per_epoch for order in self.order.epochs),
            "--shuffle or --seed": f"--seed {self.config.general.seed}" if self.config.data.shuffle else "no --shuffle",
        }

    def _fingerprint(self) -> str:
        """Of the tokens, and of the weights where there are several data sets. Names and places of folders may change."""
        sets, counts = self.order.sets, self.order.mixture.counts
        if len(sets) == 1:
            return sets[0].stream.fingerprint
        return " + ".join(f"{c}/{PATTERN} of {w.stream.fingerprint}" for w, c in zip(sets, counts, strict=True))


def with_vocabulary(config: RunConfig) -> tuple[RunConfig, str]:
    """Return the run of a new model with --vocab-size set, and a note on it for the user, "" if it was given.

    The size is the number of the data's ids rounded up to a multiple of 128, with which matrix products are fast, and the
    default where the data do not say. Raises InputError if a manifest or tokenizer cannot be read."""
    if "vocab_size" in config.given:
        return config, ""
    ids = [ids_of(config, folder) for folder in parse_weights("--train-dir", config.data.train_dir)[0]]
    if not all(ids):
        size = config.model.vocab_size
        return (
            config,
            f"vocabulary: {size:,} ids, the default, as the data do not say how many they need (--vocab-size)",
        )
    most = max(ids)
    size = aligned_size(most)
    note = f"vocabulary: {size:,} ids, the data's {most:,}" + (
        " rounded up to a multiple of 128" if size > most else ""
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size)), note


def aligned_size(ids: int) -> int:
    """Return the number of rows for so many ids: rounded up, as matrix products are fast with it."""
    return -(-ids // _ALIGNMENT) * _ALIGNMENT


def with_row_length(config: RunConfig) -> tuple[RunConfig, str]:
    """Return the run of a new model with the --seq-length of its masked rows, and a note on it for the user; the run as it
    is, and "", if it was given or there are none. Raises InputError if a manifest cannot be read."""
    if "seq_length" in config.given:
        return config, ""
    manifests = (_manifest(config, folder)[0] for folder in parse_weights("--train-dir", config.data.train_dir)[0])
    length = next((manifest.row_length for manifest in manifests if manifest and manifest.row_length), None)
    if length is None:
        return config, ""
    note = f"sequences: {length:,} tokens, as the rows of --train-dir have (--seq-length)"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, seq_length=length)), note


def with_document_mask(config: RunConfig, sets: Sequence[Windows]) -> RunConfig:
    """Return the run with --document-mask on or off. By default it is on if some of the `sets` are masked rows, which hold
    several samples."""
    if config.train.document_mask is not None:
        return config
    is_on = any(windows.stream.is_masked for windows in sets)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, document_mask=is_on))


def with_epochs(config: RunConfig, plan: BatchPlan) -> RunConfig:
    """Return the run with the --train-steps that --epochs means, if it was given: the fewest updates that read the windows
    of all data sets together so often. Raises InputError if the data cannot be opened."""
    epochs = config.train.epochs
    if epochs is None:
        return config
    folders, weights = parse_weights("--train-dir", config.data.train_dir)
    sets = [_windows(config, folder, "--train-dir") for folder in folders]
    windows = sum(order.per_epoch for order in _order(config, plan, sets, Mixture.of(weights)).epochs)
    steps = plan.steps_for(math.ceil(Fraction(repr(epochs)) * windows))  # floats would make 4 of 0.1 * 30
    return dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=steps))


def _order(
    config: RunConfig, plan: BatchPlan, sets: Sequence[Windows], mixture: Mixture, rank: int = 0, world_size: int = 1
) -> TrainingOrder:
    return TrainingOrder(
        sets, mixture, plan, rank=rank, world_size=world_size, drop_last=config.data.drop_last,
        shuffle_seed=config.general.seed if config.data.shuffle else None,
    )  # fmt: skip


def ids_of(config: RunConfig, folder: str) -> int:
    """Return the number of ids of a folder's or URL's tokenizer, by its manifest if it has one; 0 if unknown."""
    manifest, place = _manifest(config, folder)
    if manifest:
        return manifest.vocab_size
    name = config.data.tokenizer or (str(place) if has_tokenizer(place) else None)
    return load_tokenizer(name).vocab_size if name else 0


def tokenizer_of_data(config: RunConfig) -> Tokenizer:
    """Return --tokenizer, or else that of --train-dir, of several data sets the one with the most ids. Raises InputError if
    there is none."""
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    places = [_manifest(config, folder)[1] for folder in parse_weights("--train-dir", config.data.train_dir)[0]]
    found = [load_tokenizer(str(place)) for place in places if has_tokenizer(place)]
    if not found:
        raise InputError("--resize-vocab: there is no tokenizer beside --train-dir; name the data's with --tokenizer")
    return max(found, key=lambda tokenizer: tokenizer.vocab_size)


def _manifest(config: RunConfig, folder: str) -> tuple[Manifest | None, Path]:
    """Return the manifest of a folder or URL, None if it has none, and where its small files lie on this machine."""
    remote = RemoteFolder(folder, "--train-dir", _cache(config), MANIFEST) if is_url(folder) else None
    place = remote.folder if remote else Path(folder)
    return Manifest.load(place), place


def tokenizer_of(config: RunConfig, folders: list[Path], windows: Sequence[Windows]) -> Tokenizer | None:
    """Return the tokenizer of a run: --tokenizer, or the one in the first of `folders` that has one. Raises InputError if it
    is not the one that made the data `windows`, or these were made with different ones."""
    known = [(w.stream, w.stream.manifest) for w in windows if w.stream.manifest]
    is_known = config.data.tokenizer or any(has_tokenizer(model_folder(folder)) for folder in folders)
    for stream, manifest in known[1:]:
        first_stream, first = known[0]
        may_extend = is_known and manifest.vocab_size != first.vocab_size  # `match_tokenizer` will tell
        if manifest.tokenizer_sha256 != first.tokenizer_sha256 and not may_extend:
            raise InputError(
                f"{stream.option} {stream.name} was made with another tokenizer ({manifest.tokenizer}) than "
                f"{first_stream.option} {first_stream.name} ({first.tokenizer}); prepare both with one"
            )
    manifests = [manifest for _, manifest in known]
    return match_tokenizer(config.data.tokenizer, folders, manifests, config.model.real_vocab_size)


def end_of_text_of(config: RunConfig, tokenizer: Tokenizer | None, windows: Sequence[Windows]) -> int | None:
    """Return the id between documents of the data `windows` if --document-mask asks for it, else None. Manifests say it, or
    else the `tokenizer`. Raises InputError if neither does, or the data have none."""
    if not config.train.document_mask:
        return None
    by_manifest = {w.stream.name: w.stream.manifest.eot_id for w in windows if w.stream.manifest}
    if not by_manifest and tokenizer is None:
        raise InputError(
            "--document-mask: neither a manifest nor a tokenizer says which id the data have between documents; name the "
            "tokenizer that made them with --tokenizer"
        )
    found = set(by_manifest.values()) or {tokenizer.eot_id if tokenizer else None}
    if len(found) > 1:
        listed = ", ".join(f"{name}: {eot_id}" for name, eot_id in by_manifest.items())
        raise InputError(f"--document-mask: the data have different end-of-text ids ({listed}); prepare them alike")
    (eot_id,) = found
    if eot_id is None or not 0 <= eot_id < config.model.real_vocab_size:
        raise InputError(
            f"--document-mask: the data have no end-of-text token between documents (id {eot_id} by their manifest or "
            "tokenizer); prepare them with a tokenizer that has one, or leave the flag out"
        )
    return eot_id


def open_training(config: RunConfig) -> tuple[list[Windows], Mixture]:
    """Open the data sets of --train-dir and their mixture. Raises InputError."""
    folders, weights = parse_weights("--train-dir", config.data.train_dir)
    sets = [_open(config, folder, "--train-dir") for folder in folders]
    _check_room(config, [windows.stream for windows in sets if windows.stream.is_remote])
    return sets, Mixture.of(weights)


def open_validation(config: RunConfig) -> Windows:
    """Open the split of --valid-dir. Masked rows may be shorter than the model's sequences. Raises InputError."""
    return _open(config, config.data.valid_dir, "--valid-dir")


def _open(config: RunConfig, folder: str, option: str) -> Windows:
    windows = _windows(config, folder, option)
    if config.data.verify_data:
        windows.stream.verify()
    return windows


def _windows(config: RunConfig, folder: str, option: str) -> Windows:
    stream, length = TokenStream(folder, option, _cache(config)), config.model.seq_length
    if option == "--valid-dir":
        length = min(length, stream.row_length or length)
    return Windows(stream, length, config.model.real_vocab_size)


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
