"""Reads a tokenizer's folder in every form that transformers reads, with the same ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from gpt2xla.errors import InputError, in_one_line, user_error
from gpt2xla.files import read_json_object

_CONFIG, _DEFINITION, _MAP, _ADDED, _CHAT = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
# Each holds a vocabulary. Every class of transformers knows which of them it reads.
_VOCABULARIES = (
    _DEFINITION, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "spm.model",
)  # fmt: skip
TEMPLATES_FOLDER = "additional_chat_templates/"
_TEMPLATES = f"{TEMPLATES_FOLDER}*.jinja"
# Patterns of the files that make up a tokenizer.
FILES = (*_VOCABULARIES, "merges.txt", _CONFIG, _MAP, _ADDED, _CHAT, _TEMPLATES)
# With these classes transformers uses tokenizer.json unchanged; others build their own tokenizer from its vocabulary.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class StoredTokenizer:
    """The tokenizer in a folder.

    Attributes:
        roles: the special tokens by name, such as eos_token, as transformers knows them.
        files: the folder's files by name, with an equivalent `tokenizer.json` if there was none.
        config: the contents of `tokenizer_config.json`.
    """

    backend: HFTokenizer
    roles: dict[str, Any]
    files: dict[str, bytes]
    config: dict[str, Any]


def model_folder(source: Path) -> Path:
    """Return the folder of a model's tokenizer and settings: `source`, or of a file beside a config.json, its folder."""
    return source.parent if source.is_file() and (source.parent / "config.json").is_file() else source


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_folder(folder: Path) -> StoredTokenizer:
    """Return the tokenizer of a folder that `has_tokenizer`. Code in the folder is never run. Raises InputError if
    transformers cannot read it, or only by running such code."""
    with user_error(f"tokenizer {folder}"):
        found = [file for pattern in FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}
    config = _json(folder, _CONFIG, files)
    if config.get("auto_map"):
        raise InputError(
            f"{folder / _CONFIG} names a program as its tokenizer (auto_map), which is never run; remove auto_map if the "
            "files beside it are enough, or save it as tokenizer.json"
        )
    if _is_plain(folder, config, files):
        backend = read_definition(folder / _DEFINITION)
        names, known = _json(folder, _MAP, files) | config, backend.get_vocab()
        roles: dict[str, Any] = {role: text for role in _ROLES if (text := _text(names.get(role))) in known}
        if further := [text for token in _further(names) if (text := _text(token)) in known]:
            roles["additional_special_tokens"] = further
        return StoredTokenizer(backend, roles, files, config)
    if "vocab.json" in files and not {_DEFINITION, "merges.txt"} & files.keys():
        raise InputError(f"{folder} has vocab.json but no merges.txt, and a tokenizer needs both; copy it too")
    return _as_transformers_reads(folder, config, files)


def read_definition(file: Path) -> HFTokenizer:
    """Read a `tokenizer.json` under any name. Raises InputError."""
    try:
        backend = HFTokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception for everything
        raise InputError(f"{file} is not a tokenizer.json: {error}") from None
    if not backend.get_vocab():
        raise InputError(f"{file} has an empty vocabulary; choose another tokenizer")
    return backend


def chat_template(files: Mapping[str, bytes]) -> str | None:
    """Return the chat template among a tokenizer's files, or None: its own file, or else an entry of its configuration,
    where the one of several that is used by default is named so."""
    if _CHAT in files:
        return files[_CHAT].decode(errors="replace")
    try:
        found = json.loads(files.get(_CONFIG, b"{}").decode("utf-8-sig")).get("chat_template")
    except (ValueError, RecursionError, AttributeError):  # with a tokenizer.json, transformers may do without
        return None
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def with_chat_template(files: Mapping[str, bytes], text: str) -> dict[str, bytes]:
    """Return a tokenizer's files with this chat template as the only one."""
    others = {name: content for name, content in files.items() if not name.endswith(".jinja")}
    return _with_entries(others, {"chat_template": text}) if others else {}


def sketches(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return what a tokenizer's configuration says about sketches, or None."""
    try:
        found = json.loads(files.get(_CONFIG, b"{}").decode("utf-8-sig")).get("sketches")
    except (ValueError, RecursionError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def sketches_of(folders: Sequence[Path]) -> dict[str, Any] | None:
    """Return what the tokenizers in these folders of data say about sketches, with the words of all; None if none does.
    Raises InputError if they are of several sizes or pens."""
    stated = [sketches({_CONFIG: file.read_bytes()}) for folder in folders if (file := folder / _CONFIG).is_file()]
    found = [entry for entry in stated if entry]
    if len(found) < 2:
        return found[0] if found else None
    for key, default in (("size", None), ("stroke_width", 1)):
        if len({entry.get(key, default) for entry in found}) > 1:
            name = key.replace("_", "-")
            raise InputError(f"--train-dir holds sketches of several {name}s; prepare all with one --{name}")
    words = dict.fromkeys(word for entry in found for word in entry.get("words", ()))
    return {**found[0], "words": list(words)}


def with_sketches(files: Mapping[str, bytes], entry: dict[str, Any]) -> dict[str, bytes]:
    """Return a tokenizer's files with this about sketches."""
    return _with_entries(files, {"sketches": entry}) if files else {}


def with_definition(files: Mapping[str, bytes], definition: str, entries: Mapping[str, Any]) -> dict[str, bytes]:
    """Return a tokenizer's files for another `tokenizer.json` and entries of its configuration, such as eos_token: what else
    that and the chat templates say is kept."""
    kept = {name: content for name, content in files.items() if name == _CONFIG or name.endswith(".jinja")}
    kind = {"tokenizer_class": _PLAIN_CLASSES[0], "added_tokens_decoder": None, "extra_special_tokens": None}
    return _with_entries(kept, kind | dict(entries)) | {_DEFINITION: definition.encode()} if files else {}


def _with_entries(files: Mapping[str, bytes], entries: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files with these entries in the configuration; None removes an entry."""
    config = json.loads(files.get(_CONFIG, b"{}").decode("utf-8-sig")) | entries
    config = {key: value for key, value in config.items() if value is not None or key not in entries}
    return {**files, _CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _is_plain(folder: Path, config: dict[str, Any], files: dict[str, bytes]) -> bool:
    """Tell whether transformers uses tokenizer.json unchanged, so that it can be read without importing transformers."""
    if _DEFINITION not in files:
        return False
    stated = config.get("tokenizer_class")
    if stated is None and not (folder / "config.json").exists():
        return True  # no file names a class
    if stated not in _PLAIN_CLASSES or _MAP in files or _ADDED in files:
        return False
    try:
        definition = json.loads(files[_DEFINITION])
        added = {token.pop("id"): token for token in definition["added_tokens"]}
        again = {int(number): token for number, token in config.get("added_tokens_decoder", added).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return True  # reading it will report what is wrong
    known = {token.get("content") for token in added.values()}
    named = [value for key, value in config.items() if key.endswith("_token")]
    is_named = all(_text(token) in known for token in [*named, *_further(config)] if _text(token))
    return again == added and is_named and not definition.get("padding")  # that would name the pad_token


def _as_transformers_reads(folder: Path, config: dict[str, Any], files: dict[str, bytes]) -> StoredTokenizer:
    import transformers

    # Without a class or a config.json, transformers would look for the class of a model that is not here.
    is_bare = not config.get("tokenizer_class") and not (folder / "config.json").exists()
    if is_bare and not ({"vocab.json", "merges.txt"} <= files.keys() and _is_gpt2s(files["vocab.json"])):
        raise InputError(
            f"{folder} does not say what kind of tokenizer its vocabulary is for; write "
            '{"tokenizer_class": "GPT2Tokenizer"}, or whichever it is, into its tokenizer_config.json'
        )
    kind = transformers.GPT2TokenizerFast if is_bare else transformers.AutoTokenizer
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        theirs = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        backend = theirs.backend_tokenizer
        has_words = backend.get_vocab_size(with_added_tokens=False) > 0
    except Exception as error:  # the classes that read it raise errors of any type
        reason = in_one_line(error).rstrip(".;:")
        needs_library = any(name.endswith(".model") for name in files) and find_spec("sentencepiece") is None
        fix = "pip install sentencepiece and try again, or " if needs_library else ""
        raise InputError(
            f"tokenizer {folder}: transformers cannot read it as a fast one ({type(error).__name__}: {reason}); {fix}save "
            "it as tokenizer.json, with save_pretrained of a fast tokenizer"
        ) from None
    finally:
        transformers.logging.set_verbosity(level)
    wanted = {name for key, name in theirs.vocab_files_names.items() if key != "tokenizer_file"}
    if not has_words or (_DEFINITION not in files and (missing := sorted(wanted - files.keys()))):
        raise InputError(
            f"{folder} has no {' or '.join(missing or wanted)} with words, which its tokenizer's class, "
            f"{type(theirs).__name__}, needs; copy it too, or correct tokenizer_class in tokenizer_config.json"
        )
    roles: dict[str, Any] = {role: text for role in _ROLES if (text := _text(getattr(theirs, role, None)))}
    if further := [text for text in theirs.all_special_tokens if text not in roles.values()]:
        roles["additional_special_tokens"] = further
    files = files | {_DEFINITION: backend.to_str().encode()}
    if _CONFIG not in files:
        said = {"tokenizer_class": type(theirs).__name__, **roles}
        files[_CONFIG] = (json.dumps(said, indent=2) + "\n").encode()
    return StoredTokenizer(backend, roles, files, config)


def _is_gpt2s(vocabulary: bytes) -> bool:
    """Tell whether a vocab.json is spelled in GPT-2's characters for bytes and has its end of text."""
    from tokenizers import pre_tokenizers

    try:
        words = json.loads(vocabulary)
    except (ValueError, RecursionError):
        return True  # reading it will report what is wrong
    return isinstance(words, dict) and {"<|endoftext|>", *pre_tokenizers.ByteLevel.alphabet()} <= words.keys()


def _json(folder: Path, name: str, files: dict[str, bytes]) -> dict[str, Any]:
    return (read_json_object(folder / name) or {}) if name in files else {}


def _further(config: dict[str, Any]) -> Iterator[Any]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or []
        yield from tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()


def _text(token: Any) -> str | None:
    """Return the text of a token in any of its forms: a string, a dictionary with options, or an AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    text = None if token is None else getattr(token, "content", token)
    return text if isinstance(text, str) else None
