"""Text to token ids and back: a tiktoken encoding, a Hugging Face tokenizer or plain bytes, behind one small class.

Every tokenizer can be written as `tokenizer.json`, so shards and checkpoints carry theirs and transformers loads it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gpt2xla.data.shards import Manifest
from gpt2xla.errors import InputError

FILES = ("tokenizer.json", "tokenizer_config.json")
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Encodes ordinary text: special tokens written out in the text are encoded as text, never as the special token.

    Attributes:
        name: how the user names it: a tiktoken encoding, "bytes", or a path.
        vocab_size: one more than the largest id.
        eot_id: id of the end-of-text token that separates documents, or None if the tokenizer has none.
        sha256: hash of vocabulary and merges: the same for the same tokenizer from another library or file.
    """

    def __init__(self, name: str, backend: HFTokenizer, encode_batch: Callable[[Sequence[str]], list] | None = None):
        backend.encode_special_tokens = True
        self.name = name
        self.backend = backend
        self._encode_batch = encode_batch or (
            lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        )
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eot_id: int | None = backend.token_to_id(END_OF_TEXT)
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
        return self.backend.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained(folder)` reads."""
        special = {} if self.eot_id is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "name_or_path": self.name,
            **special,
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
    """A tiktoken encoding or model name ("gpt2"), "bytes", or the path of a tokenizer.json or of a folder with one.

    Raises:
        InputError: there is no such tokenizer, or tiktoken cannot download it.
    """
    if name == "bytes":
        vocab = {char: byte for byte, char in _byte_alphabet().items()}
        return Tokenizer(name, _byte_level_bpe(vocab, [], {END_OF_TEXT: 256}))
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return _load_file(file)
    known = tiktoken.list_encoding_names()
    try:
        encoding = tiktoken.get_encoding(name) if name in known else tiktoken.encoding_for_model(name)
    except KeyError:
        raise InputError(
            f"tokenizer {name!r}: neither a file, nor a folder with tokenizer.json, nor one of tiktoken's "
            f"({', '.join(known)})"
        ) from None
    except OSError as error:
        raise InputError(
            f"tokenizer {name!r}: tiktoken could not download it ({type(error).__name__}); go online once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that holds it, or give the path of a tokenizer.json"
        ) from None
    return _from_tiktoken(name, encoding)


def train_bpe(documents: Iterable[str], name: str, vocab_size: int, min_frequency: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer with GPT-2's way of splitting words, end-of-text being its last id."""
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(name, backend)


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


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


def _load_file(file: Path) -> Tokenizer:
    try:
        backend = HFTokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception for everything
        raise InputError(f"{file} is not a tokenizer.json: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    try:
        name = json.loads((file.parent / "tokenizer_config.json").read_text(encoding="utf-8"))["name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):  # it only gives the tokenizer a nicer name
        name = str(file)
    return Tokenizer(name, backend)


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
