"""What a model's folder says about generation: the ids that begin, end and pad a text, and `generation_config.json`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2xla.chat.template import ChatTemplate
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.data.tokenizer_folder import has_tokenizer, model_folder
from gpt2xla.errors import InputError
from gpt2xla.files import read_json_object

GENERATION_CONFIG = "generation_config.json"
# Its options that do not change which tokens are drawn, or that a command's own flags decide: how many, and whether to draw.
_HARMLESS = ("do_sample", "max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config")
_NEUTRAL: tuple[Any, ...] = (None, [], {}, False, 0, 1, 1.0)  # values with which transformers' options do nothing


@dataclass(frozen=True)
class GenerationSettings:
    """What a model's files say about generation, kept as it is so that it can be written again."""

    config: dict[str, Any]  # the ids of special tokens and task_specific_params from `config.json`
    generation: dict[str, Any] | None  # all of `generation_config.json`; None if there is no such file

    @classmethod
    def load(cls, folder: Path) -> GenerationSettings:
        """Read the settings of a Hugging Face model folder. Raises InputError if a file is damaged."""
        config = _read(folder / "config.json") or {}
        kept = {
            key: value for key, value in config.items() if key.endswith("_token_id") or key == "task_specific_params"
        }
        return cls(kept, _read(folder / GENERATION_CONFIG))

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> GenerationSettings:
        """Return the settings of a new model with this tokenizer."""
        if tokenizer is None:
            return cls.ending_with(None)
        bos, pad = tokenizer.id_of("bos_token"), tokenizer.id_of("pad_token")
        ids = {"bos_token_id": tokenizer.eot_id if bos is None else bos, "eos_token_id": tokenizer.eot_id}
        ids |= {} if pad is None else {"pad_token_id": pad}
        return cls(ids, ids | {"do_sample": True}).ending_answers(tokenizer)

    @classmethod
    def ending_with(cls, eot_id: int | None) -> GenerationSettings:
        """Return settings with which texts begin and end with the same token."""
        ids = {"bos_token_id": eot_id, "eos_token_id": eot_id}
        return cls(ids, ids | {"do_sample": True})

    def ending_answers(self, tokenizer: Tokenizer) -> GenerationSettings:
        """Return settings with which texts also end where answers do, by the tokenizer's chat template: transformers stops
        at the ids of `generation_config.json` alone. A template that cannot be read changes nothing."""
        try:
            template = ChatTemplate.of(tokenizer)
            ends = template.stop_ids(tokenizer) if template else ()
        except InputError:  # it is another program's, and only --chat needs it
            return self
        known = self.stop_ids(tokenizer.eot_id)
        if known.issuperset(ends):
            return self
        ids = {key: value for key, value in self.config.items() if key.endswith("_token_id")}
        stops = [*ends, *sorted(known.difference(ends))]
        return GenerationSettings(self.config, {**(self.generation or ids), "eos_token_id": stops})

    def stop_ids(self, default: int | None) -> frozenset[int]:
        """Return the ids that end a text: eos_token_id of `generation_config.json`, else of `config.json`, else `default`.

        An id that the model does not have, such as -1, counts as stated and ends nothing, as in transformers."""
        stated = next(self._stated("eos_token_id"), default)
        return frozenset(filter(_is_id, stated if isinstance(stated, list) else [stated]))

    def unused(self) -> dict[str, Any]:
        """Return the options of `generation_config.json` that change what transformers draws, and that do not count here."""
        return {
            key: value
            for key, value in (self.generation or {}).items()
            if not (key.endswith("_token_id") or key in _HARMLESS or value in _NEUTRAL)
        }

    def start_id(self, tokenizer: Tokenizer, vocab_size: int) -> int | None:
        """Return the id after which a text without a prompt begins, or None if there is none: bos_token_id, found in the
        same order as above, else an id that ends texts."""
        ids = [*self._stated("bos_token_id"), tokenizer.id_of("bos_token"), *sorted(self.stop_ids(tokenizer.eot_id))]
        return next((i for i in ids if _is_id(i) and i < vocab_size), None)

    def _stated(self, key: str) -> Iterator[Any]:
        for values in (self.generation or {}, self.config):
            if values.get(key) is not None:
                yield values[key]


def settings_of(source: Path | None, tokenizer: Tokenizer | None) -> GenerationSettings:
    """Return the settings to save with a model that starts from `source` and has this tokenizer: those of the source, unless
    its tokenizer is a different one. They end texts where the tokenizer's chat template ends answers, too."""
    if source is None or not (folder := model_folder(source)).is_dir():
        return GenerationSettings.of(tokenizer)
    stored = GenerationSettings.load(folder)
    if tokenizer is None:
        return stored
    if has_tokenizer(folder):
        try:
            is_own = load_tokenizer(str(folder)).sha256 == tokenizer.sha256
        except InputError:  # it cannot be read, so the user named another one
            is_own = False
    else:
        is_own = any(i < tokenizer.vocab_size for i in stored.stop_ids(None))
    return stored.ending_answers(tokenizer) if is_own else GenerationSettings.of(tokenizer)


def _read(file: Path) -> dict[str, Any] | None:
    values = read_json_object(file)
    if values is None:
        return None
    for key in ("bos_token_id", "eos_token_id"):
        stated = values.get(key)
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if not all(type(i) is int for i in ids):
            raise InputError(
                f"{file}: {key} is {str(stated)[:80]!r}, not an id; write a whole number or a list of them"
            )
    return values


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0
