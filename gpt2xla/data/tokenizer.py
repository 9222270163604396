"""Text to token ids and back: a tiktoken encoding, a Hugging Face tokenizer or plain bytes, behind one small class.

Every tokenizer can be written as `tokenizer.json`, so shards and checkpoints carry their own, which transformers loads.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gpt2xla import hub
from gpt2xla.config.paths import is_url
from gpt2xla.data import tokenizer_folder
from gpt2xla.data.shards import Manifest
from gpt2xla.data.tokenizer_folder import has_tokenizer, model_folder
from gpt2xla.errors import InputError, in_one_line, name_copy, user_error
from gpt2xla.storage import Bucket

END_OF_TEXT = "<|endoftext|>"
_MOST_BYTES = 200e6  # of a file behind a URL: tokenizers have some 35 at most, a model that is named by mistake more
_ROLES: dict[str, Any] = dict.fromkeys(("bos_token", "unk_token", "eos_token"), END_OF_TEXT)  # of GPT-2's tokenizer


class Tokenizer:
    """Encodes text as transformers does with `add_special_tokens=False`: nothing is added before or after it.

    Special tokens that a text spells out are encoded as letters, as with transformers' `split_special_tokens=True`;
    `reading_special_tokens` returns a tokenizer that encodes them as tokens.

    Attributes:
        name: the user's name for it: a tiktoken encoding, "bytes", a path or a hub id.
        vocab_size: one more than the largest id.
        text_vocab_size: one more than the largest id that is not a special token.
        special_tokens: their names in `tokenizer_config.json`, such as eos_token.
        eot_id: id of the token that ends each document: the tokenizer's eos_token, otherwise <|endoftext|>. None if it has
            neither.
        sha256: hash of vocabulary and merges: the same for the same tokenizer from another library or file.
        added: tokens that are matched in a text before it is split into words, and whether each is a special one.
        adds_special_tokens: whether transformers by default adds tokens before or after a text.
        chat_template: how it writes a conversation, as Jinja text; None if it has no such template.
        sketches: which sketches its ids write, as `SketchFormat` reads it; None if it is not made for any.
    """

    def __init__(
        self,
        name: str,
        backend: HFTokenizer,
        special_tokens: Mapping[str, Any],
        *,
        encoding: tiktoken.Encoding | None = None,
        files: Mapping[str, bytes] | None = None,
        reads_special_tokens: bool = True,
    ) -> None:
        self.adds_special_tokens = backend.num_special_tokens_to_add(is_pair=False) > 0
        self.added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.name, self.backend = name, backend
        self._encoding, self._files, self._reads_special_tokens = encoding, dict(files or {}), reads_special_tokens
        self.chat_template = tokenizer_folder.chat_template(self._files)
        self.sketches: dict[str, Any] | None = tokenizer_folder.sketches(self._files)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.text_vocab_size = max((i for text, i in vocab.items() if not self.added.get(text)), default=-1) + 1
        self.special_tokens = dict(special_tokens)
        if backend.token_to_id(END_OF_TEXT) is not None:
            self.special_tokens.setdefault("eos_token", END_OF_TEXT)
        self.eot_id = self.id_of("eos_token")
        self.sha256 = _hash_of_vocabulary(backend)

    @property
    def dtype(self) -> np.dtype:
        """The type of its ids in shards: uint16, or uint32 for more than 65,536 ids."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def made(self, manifest: Manifest) -> bool:
        """Tell whether this tokenizer made a split, or did before tokens were added to it, such as those of a chat: they do
        not change how a text is encoded."""
        if manifest.vocab_size < self.vocab_size:
            return _hash_of_vocabulary(self.backend, manifest.vocab_size) == manifest.tokenizer_sha256
        return self.sha256 == manifest.tokenizer_sha256

    def id_of(self, role: str) -> int | None:
        """Return the id of a special token by its name in `tokenizer_config.json`, such as "pad_token", or None."""
        text = self.special_tokens.get(role)
        return None if text is None else self.backend.token_to_id(text)

    def reading_special_tokens(self) -> Tokenizer:
        """Return the same tokenizer for text whose spelled special tokens mean these tokens, as transformers reads them."""
        twin = copy.copy(self)
        twin.backend = HFTokenizer.from_str(self.backend.to_str())
        twin.backend.encode_special_tokens = not self._reads_special_tokens
        return twin

    def with_special_tokens(self, tokens: Sequence[str], *, take_white_space: bool = False) -> Tokenizer:
        """Return the tokenizer with further special tokens, whose ids follow its last one in this order. Its name says so.
        With `take_white_space`, white space beside them in a text is part of them. Raises InputError if it has them already,
        or gaps among its ids."""
        backend = HFTokenizer.from_str(self.backend.to_str())
        takes = {"lstrip": take_white_space, "rstrip": take_white_space}
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False, **takes) for token in tokens])
        if [backend.token_to_id(token) for token in tokens] != [*range(self.vocab_size, self.vocab_size + len(tokens))]:
            why = "it has them already, or gaps among its ids; choose another tokenizer"
            raise InputError(f"tokenizer {self.name} cannot take {', '.join(tokens)} after its last id: {why}")
        known, name = self.special_tokens.get("additional_special_tokens", ()), f"{self.name} with {', '.join(tokens)}"
        roles = self.special_tokens | {"additional_special_tokens": [*known, *tokens]}
        files = tokenizer_folder.with_definition(self._files, backend.to_str(), roles | {"name_or_path": name})
        twin = Tokenizer(name, backend, roles, files=files, reads_special_tokens=self._reads_special_tokens)
        twin.chat_template, twin.sketches = self.chat_template, self.sketches
        return twin

    def with_chat_template(self, text: str) -> Tokenizer:
        """Return the same tokenizer with a chat template, which `save` writes where transformers finds it."""
        twin = copy.copy(self)
        twin.chat_template, twin._files = text, tokenizer_folder.with_chat_template(self._files, text)
        return twin

    def with_sketches(self, sketches: dict[str, Any]) -> Tokenizer:
        """Return the same tokenizer with what `sketches` is, which `save` writes into its configuration."""
        twin = copy.copy(self)
        twin.sketches, twin._files = sketches, tokenizer_folder.with_sketches(self._files, sketches)
        return twin

    def encode(self, text: str) -> list[int]:
        return list(self.encode_batch([text])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int] | np.ndarray]:
        if self._encoding is None:
            return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        allowed: Any = set() if self.backend.encode_special_tokens else "all"
        return [self._encoding.encode_to_numpy(t, allowed_special=allowed, disallowed_special=()) for t in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary are left out."""
        return self.backend.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write what `AutoTokenizer.from_pretrained(folder)` reads: the files that it was loaded from, unchanged, or
        `tokenizer.json` and `tokenizer_config.json`."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "name_or_path": self.name,
            **self.special_tokens,
            **({} if self.chat_template is None else {"chat_template": self.chat_template}),
            **({} if self.sketches is None else {"sketches": self.sketches}),
        }
        files = {
            "tokenizer.json": self.backend.to_str().encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
            **self._files,
        }
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def _hash_of_vocabulary(backend: HFTokenizer, below: float = math.inf) -> str:
    model = json.loads(backend.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    vocab = {token: i for token, i in backend.get_vocab(with_added_tokens=True).items() if i < below}
    return hashlib.sha256(json.dumps([vocab, merges], sort_keys=True).encode()).hexdigest()


def load_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer by name: a tiktoken encoding or model ("gpt2"), "bytes", the path of a tokenizer.json or of a
    folder with a tokenizer that transformers reads, the URL of one, or the id of a model on the Hugging Face hub
    ("owner/name"). Raises InputError if there is no such tokenizer, or it cannot be downloaded."""
    if is_url(name):
        return _from_url(name)
    if name == "bytes":
        vocab = {char: byte for byte, char in _byte_alphabet().items()}
        return Tokenizer(name, _byte_level_bpe(vocab, [], {END_OF_TEXT: 256}), _ROLES)
    path, known = Path(name), tiktoken.list_encoding_names()
    with user_error(f"tokenizer {name!r}"):  # no permission, or a name that is too long
        if path.is_file():
            if path.name == "tokenizer.json":
                return _load_folder(path.parent)
            return Tokenizer(name, tokenizer_folder.read_definition(path), {})
        if path.is_dir() and has_tokenizer(path):
            return _load_folder(path)
        is_folder = path.is_dir()
    try:
        encoding = tiktoken.get_encoding(name) if name in known else tiktoken.encoding_for_model(name)
    except KeyError:
        if is_folder:
            held = "neither tokenizer.json nor vocab.json and merges.txt"
            raise InputError(f"tokenizer {name!r}: the folder holds {held}") from None
        if "/" in name and hub.is_id(name):
            return _from_hub(name)
        nor = f"nor a folder with a tokenizer, nor owner/name on the hub, nor one of tiktoken's ({', '.join(known)})"
        raise InputError(f"tokenizer {name!r}: neither a file, {nor}") from None
    except OSError as error:
        raise InputError(
            f"tokenizer {name!r}: tiktoken could not download it ({type(error).__name__}); go online once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or give the path of a tokenizer.json"
        ) from None
    return _from_tiktoken(name, encoding)


def train_bpe(
    documents: Iterable[str], name: str, vocab_size: int, min_frequency: int, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Train a byte-level byte-pair tokenizer that splits words as GPT-2's does.

    Its ids are the 256 bytes, the merges, end-of-text, then `special_tokens` in their order: `vocab_size` in all, or fewer
    if no more pairs occur `min_frequency` times. Documents are read once; memory holds their distinct words. Raises
    InputError if a special token could also result from merges, or is given twice.
    """
    special = [END_OF_TEXT, *special_tokens]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for number, token in enumerate(special):
        # Merges never cross the pieces into which text is split.
        if len(byte_level.pre_tokenize_str(token)) < 2 or any(character.isspace() for character in token):
            raise InputError(f"--special-tokens {token!r} may occur in ordinary text; choose one such as '<|user|>'")
        if token in special[:number]:
            raise InputError(f"--special-tokens {token!r} exists already; leave it out")
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), min_frequency=min_frequency, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(documents, trainer)
    added = backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert added == len(special)
    further = {"additional_special_tokens": list(special_tokens)} if special_tokens else {}
    return Tokenizer(name, backend, _ROLES | further)


def find_tokenizer(asked: str | None, source: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of the model in `source`: the requested one, otherwise the model's own.

    Raises InputError if there is no such tokenizer, or ids of text reach beyond the model's `vocab_size`. Those of special
    tokens may: a [PAD] that was added to the tokenizer but not to the model does no harm.
    """
    folder = model_folder(source)
    if asked is None and not has_tokenizer(folder):
        fix = "name the one that it was trained with: --tokenizer gpt2 (OpenAI's), bytes, a folder or a hub id"
        raise InputError(f"{source} has no tokenizer; {fix}")
    tokenizer = load_tokenizer(asked or str(folder))
    check_ids(tokenizer, tokenizer.text_vocab_size, vocab_size, source)
    return tokenizer


def check_ids(tokenizer: Tokenizer, ids: int, vocab_size: int, source: object, fix: str = "") -> None:
    """Raise InputError if `ids` of the tokenizer are more than the `vocab_size` that `source` has."""
    if ids > vocab_size:
        fix = fix or "name the tokenizer that the model was trained with"
        has = f"has {tokenizer.vocab_size} ids, but {source} only {vocab_size}"
        raise InputError(f"--tokenizer {tokenizer.name} {has}; {fix}")


def match_tokenizer(
    asked: str | None, folders: Sequence[Path], manifests: Sequence[Manifest], vocab_size: int
) -> Tokenizer | None:
    """Return the tokenizer of a run: the requested one, otherwise that of the first of `folders` with one, otherwise None.
    Its chat template is that of the data, if they have one. Raises InputError if it is not the one that made all the data,
    or has ids beyond the model's `vocab_size`, or the data have several templates."""
    found = asked or next((str(folder) for folder in map(model_folder, folders) if has_tokenizer(folder)), None)
    if found is None:
        return None
    tokenizer = load_tokenizer(found)
    for manifest in manifests:
        if not tokenizer.made(manifest):
            fix = "leave --tokenizer out" if asked else "name the shards' with --tokenizer to change to it"
            if not asked and manifest.vocab_size > tokenizer.vocab_size:
                fix = "if theirs only adds tokens, train with --resize-vocab"
            raise InputError(
                f"tokenizer {tokenizer.name}{'' if asked else f' of {found}'} is not the one that all shards were made with "
                f"({manifest.tokenizer}); {fix}, or prepare --train-dir and --valid-dir with one"
            )
    check_ids(tokenizer, tokenizer.vocab_size, vocab_size, "--vocab-size", f"use at least {tokenizer.vocab_size}")
    templates = {manifest.chat_template for manifest in manifests if manifest.chat_template}
    if len(templates) > 1:
        raise InputError("--train-dir and --valid-dir hold data of different chat templates; prepare all with one")
    return tokenizer.with_chat_template(*templates) if templates - {tokenizer.chat_template} else tokenizer


def _load_folder(folder: Path, name: str | None = None) -> Tokenizer:
    stored = tokenizer_folder.read_folder(folder)
    stated = stored.config.get("name_or_path")
    roles = stored.roles or (_ROLES if END_OF_TEXT in stored.backend.get_vocab() else {})
    return Tokenizer(
        name or (stated if isinstance(stated, str) and stated else str(folder)), stored.backend, roles, files=stored.files,
        reads_special_tokens=not stored.config.get("split_special_tokens"),
    )  # fmt: skip


def _from_hub(name: str) -> Tokenizer:
    what = f"tokenizer {name!r}: no such file or folder here"
    with hub.explained(what, name, "give the path of a downloaded tokenizer.json"):
        # config.json names the class of a tokenizer that does not name it.
        folder = hub.snapshot(name, [*tokenizer_folder.FILES, "config.json"])
    if not has_tokenizer(folder):
        raise InputError(f"tokenizer {name!r}: that model has no tokenizer on the hub; choose another that has one")
    return _load_folder(folder, name)


def _from_url(url: str) -> Tokenizer:
    """Return the tokenizer in a folder or file behind a URL. Nothing of it is kept on this machine."""
    bucket = Bucket(url, "--tokenizer")
    parent, _, file = bucket.url.rpartition("/")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        try:
            found = bucket.entries()
            if "" in found and file != "tokenizer.json":
                if (size := found[""][0]) > _MOST_BYTES:
                    raise InputError(
                        f"--tokenizer {url} has {size / 1e6:,.0f} MB, too many for a tokenizer.json; name one"
                    )
                bucket.fetch({"": folder / file})
                name_copy(folder / file, url)
                return Tokenizer(url, tokenizer_folder.read_definition(folder / file), {})
            if "" in found:
                bucket = Bucket(parent, "--tokenizer")
                found = bucket.entries()
            if tokenizer_folder.TEMPLATES_FOLDER in found:
                found |= dict.fromkeys(bucket.files(tokenizer_folder.TEMPLATES_FOLDER), (0, ""))
            patterns = (*tokenizer_folder.FILES, "config.json")
            names = [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]
            bucket.fetch({name: folder / name for name in names})
        except OSError as error:
            raise InputError(f"--tokenizer {url}: {in_one_line(error)}; check address and credentials") from None
        if not has_tokenizer(folder):
            raise InputError(f"--tokenizer {url}: no tokenizer is there; check the address, or name a folder with one")
        name_copy(folder, bucket.url)
        return _load_folder(folder, url)


def _from_tiktoken(name: str, encoding: tiktoken.Encoding) -> Tokenizer:
    """Return a tokenizer that encodes with tiktoken, and saves the same vocabulary as byte-level BPE in `tokenizer.json`."""
    ranks = encoding._mergeable_ranks
    alphabet = _byte_alphabet()
    spell = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    merges = [tuple(map(spell.__getitem__, _last_merge(ranks, token))) for token in ranks if len(token) > 1]
    backend = _byte_level_bpe(vocab, merges, encoding._special_tokens, encoding._pat_str)
    return Tokenizer(name, backend, _ROLES, encoding=encoding)


def _last_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """Return the two parts whose merge makes `token`: byte-pair encode it with only the merges that came before it."""
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [(a, b) for a, b in halves if a in ranks and b in ranks]
    if len(known) == 1:  # true of most tokens
        return known[0]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = (ranks.get(a + b, ranks[token]) for a, b in itertools.pairwise(parts))
        i = min(enumerate(candidates), key=lambda pair: pair[1])[0]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte, in which byte-level tokenizers are spelled: the byte's own character
    if it is printable, otherwise the next one from U+0100 on."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(character): character for character in characters if ord(character) < 256}
    others = iter(characters[len(printable) :])
    return {byte: printable.get(byte) or next(others) for byte in range(256)}


def _byte_level_bpe(
    vocab: dict[str, int], merges: list, special: dict[str, int], pattern: str | None = None
) -> HFTokenizer:
    backend = HFTokenizer(models.BPE(vocab=vocab | special, merges=merges))
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend
