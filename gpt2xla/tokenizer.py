"""Text to token ids and back: a tiktoken encoding, a Hugging Face tokenizer or plain bytes, behind one small class.

Every tokenizer can be written as `tokenizer.json`, so shards and checkpoints carry theirs and transformers loads it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gpt2xla.data.shards import Manifest
from gpt2xla.errors import InputError, blaming
from gpt2xla.json_file import read_json

FILES = ("tokenizer.json", "tokenizer_config.json")
END_OF_TEXT = "<|endoftext|>"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


class Tokenizer:
    """Encodes ordinary text: special tokens written out in the text are encoded as text, never as the special token.

    Attributes:
        name: how the user names it: a tiktoken encoding, "bytes", or a path.
        vocab_size: one more than the largest id.
        eot_id: id of the end-of-text token that separates documents: <|endoftext|>, or where there is none, what the
            tokenizer calls eos_token (Llama, Qwen). None if it has neither.
        special_tokens: the names of special tokens in `tokenizer_config.json`, eos_token being end-of-text.
        sha256: hash of vocabulary and merges: the same for the same tokenizer from another library or file.
    """

    def __init__(
        self,
        name: str,
        backend: HFTokenizer,
        encode_batch: Callable[[Sequence[str]], list] | None = None,
        special_tokens: dict[str, Any] | None = None,
    ) -> None:
        backend.encode_special_tokens = True
        self.name = name
        self.backend = backend
        self._encode_batch = encode_batch or (
            lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        )
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        named = dict.fromkeys(("bos_token", "unk_token"), END_OF_TEXT) if special_tokens is None else special_tokens
        ends = [
            token for token in (END_OF_TEXT, named.get("eos_token")) if token and backend.token_to_id(token) is not None
        ]
        self.eot_id: int | None = backend.token_to_id(ends[0]) if ends else None
        self.special_tokens = named | {"eos_token": ends[0]} if ends else special_tokens or {}
        self.sha256 = _hash_of_vocabulary(backend)

    @property
    def dtype(self) -> np.dtype:
        """What shards hold its ids as: uint16, or uint32 for more than 65,536 of them."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, text: str) -> list[int]:
        return list(self.encode_batch([text])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int] | np.ndarray]:
        return self._encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no valid UTF-8 become U+FFFD; ids beyond the vocabulary (padding of the model's) vanish."""
        return self.backend.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained(folder)` reads."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "name_or_path": self.name,
            **self.special_tokens,
        }
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _hash_of_vocabulary(backend: HFTokenizer) -> str:
    model = json.loads(backend.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    vocab = backend.get_vocab(with_added_tokens=True)
    return hashlib.sha256(json.dumps([vocab, merges], sort_keys=True).encode()).hexdigest()


class TextStream:
    """Text of a growing list of ids, handed out only as far as no later id can change it: a character whose bytes come in
    several tokens appears when it is whole."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = [i for i in ids if i != tokenizer.eot_id]
        self.text = tokenizer.decode(self._ids)

    def add(self, token: int) -> str:
        """What the token adds, "" while it ends inside a character."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new, self.text = text[len(self.text) :], text
        return new

    def rest(self) -> str:
        """What was held back."""
        return self._tokenizer.decode(self._ids)[len(self.text) :]


def load_tokenizer(name: str) -> Tokenizer:
    """A tiktoken encoding or model name ("gpt2"), "bytes", the path of a tokenizer.json or of a folder with one, or the id
    of a model on the Hugging Face hub ("owner/name").

    Raises:
        InputError: there is no such tokenizer, or it is not here and cannot be downloaded.
    """
    if name == "bytes":
        vocab = {char: byte for byte, char in _byte_alphabet().items()}
        return Tokenizer(name, _byte_level_bpe(vocab, [], {END_OF_TEXT: 256}))
    path = Path(name)
    with blaming(f"tokenizer {name!r}"):  # no permission, or a name that is too long
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            return _load_file(file)
    known = tiktoken.list_encoding_names()
    try:
        encoding = tiktoken.get_encoding(name) if name in known else tiktoken.encoding_for_model(name)
    except KeyError:
        if _HUB_ID.fullmatch(name):
            return _from_hub(name)
        raise InputError(
            f"tokenizer {name!r}: neither a file, nor a folder with tokenizer.json, nor owner/name on the hub, nor one of "
            f"tiktoken's ({', '.join(known)})"
        ) from None
    except OSError as error:
        raise InputError(
            f"tokenizer {name!r}: tiktoken could not download it ({type(error).__name__}); go online once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or give the path of a tokenizer.json"
        ) from None
    return _from_tiktoken(name, encoding)


def train_bpe(
    documents: Iterable[str], name: str, vocab_size: int, min_frequency: int, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """A byte-level byte-pair tokenizer with GPT-2's way of splitting words.

    Its ids: the 256 bytes, the merges, end-of-text, then `special_tokens` in their order; `vocab_size` in all, or fewer
    where no more pairs occur `min_frequency` times. Documents are read once; memory holds their distinct words.

    Raises:
        InputError: a special token is one that merges can make, or is given twice.
    """
    special = [END_OF_TEXT, *special_tokens]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for number, token in enumerate(special):
        # Merges stay within the pieces that text is split into.
        if len(byte_level.pre_tokenize_str(token)) < 2 or any(character.isspace() for character in token):
            raise InputError(
                f"--special-tokens {token!r} is what ordinary text may hold; choose one such as '<|user|>'"
            )
        if token in special[:number]:
            raise InputError(f"--special-tokens {token!r} is there already; leave it out")
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    added = backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert added == len(special)
    names: dict[str, Any] = dict.fromkeys(("bos_token", "unk_token"), END_OF_TEXT)
    if special_tokens:
        names["additional_special_tokens"] = list(special_tokens)
    return Tokenizer(name, backend, special_tokens=names)


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def find_tokenizer(asked: str | None, source: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of the model in `source`: the one asked for, else the model's own, else GPT-2's.

    Raises:
        InputError: there is no such tokenizer, or it has ids beyond the model's real ones, of which there are `vocab_size`.
    """
    tokenizer = load_tokenizer(asked or (str(source) if has_tokenizer(source) else "gpt2"))
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids but {source} only {vocab_size}; name the "
            "tokenizer that the model was trained with"
        )
    return tokenizer


def match_tokenizer(
    asked: str | None, folders: Sequence[Path], manifests: Sequence[Manifest], vocab_size: int
) -> Tokenizer | None:
    """The tokenizer of a run: the one asked for, else the one in the first of `folders` that has one, else None.

    Raises:
        InputError: it is not the one that made all the data, or it has ids beyond the model's `vocab_size`.
    """
    found = asked or next((str(folder) for folder in folders if has_tokenizer(folder)), None)
    if found is None:
        return None
    tokenizer = load_tokenizer(found)
    for manifest in manifests:
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise InputError(
                f"tokenizer {tokenizer.name} is not the one that all shards were made with ({manifest.tokenizer}); leave "
                "--tokenizer out, or prepare --train-dir and --valid-dir with one"
            )
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size} is too small for tokenizer {tokenizer.name}; use at least {tokenizer.vocab_size}"
        )
    return tokenizer


def _load_file(file: Path, name: str | None = None) -> Tokenizer:
    try:
        backend = HFTokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception for everything
        raise InputError(f"{file} is not a tokenizer.json: {error}") from None
    if not backend.get_vocab():
        raise InputError(f"{file} has an empty vocabulary; choose another tokenizer")
    backend.no_padding()
    backend.no_truncation()
    try:
        config = read_json(file.parent / "tokenizer_config.json")
        names = _named_special_tokens(config, backend)
    except (OSError, ValueError, AttributeError):  # a tokenizer.json alone will do
        config, names = {}, None
    return Tokenizer(name or config.get("name_or_path") or str(file), backend, special_tokens=names)


def _named_special_tokens(config: dict[str, Any], backend: HFTokenizer) -> dict[str, Any]:
    """As strings, of a `tokenizer_config.json`: it may spell out how a token is to be matched, and name some that the
    vocabulary lacks."""

    def known(token: Any) -> str | None:
        text = token.get("content") if isinstance(token, dict) else token
        return text if isinstance(text, str) and backend.token_to_id(text) is not None else None

    names = {name: known(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    further = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if isinstance(further, list):
        names["additional_special_tokens"] = [token for token in map(known, further) if token]  # type: ignore[assignment]
    return {name: value for name, value in names.items() if value}


def _from_hub(name: str) -> Tokenizer:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the hub client lets errors of several HTTP libraries through
        raise InputError(
            f"tokenizer {name!r}: no such file or folder here, and the hub did not give it ({type(error).__name__}); check "
            "the name, go online once (logged in, if the model is gated), or give the path of a downloaded tokenizer.json"
        ) from None
    if not has_tokenizer(folder):
        raise InputError(f"tokenizer {name!r}: it has no tokenizer.json on the hub; choose another that has one")
    return _load_file(folder / "tokenizer.json", name)


def _from_tiktoken(name: str, encoding: tiktoken.Encoding) -> Tokenizer:
    """tiktoken does the encoding; the same vocabulary as byte-level BPE goes into `tokenizer.json`."""
    ranks = encoding._mergeable_ranks
    alphabet = _byte_alphabet()
    spell = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    merges = [tuple(map(spell.__getitem__, _last_merge(ranks, token))) for token in ranks if len(token) > 1]
    backend = _byte_level_bpe(vocab, merges, encoding._special_tokens, encoding._pat_str)
    return Tokenizer(name, backend, lambda texts: [encoding.encode_to_numpy(t, disallowed_special=()) for t in texts])


def _last_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two parts whose merge makes `token`: byte-pair encode it with only the merges that came before it."""
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [(a, b) for a, b in halves if a in ranks and b in ranks]
    if len(known) == 1:  # as of most tokens
        return known[0]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = (ranks.get(a + b, ranks[token]) for a, b in itertools.pairwise(parts))
        i = min(enumerate(candidates), key=lambda pair: pair[1])[0]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, which byte-level tokenizers are spelled in: a character of its own where
    the byte is a printable one, and those from U+0100 on in turn for the others."""
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
