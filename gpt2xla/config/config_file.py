"""Options from a YAML or JSON file.

The words of a value are read as the command line reads them. What YAML 1.1 makes of unquoted words does not count: to YAML
6e-4 is text, no is false, and 1:30 is 90.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gpt2xla.config.optim import UNUSED
from gpt2xla.config.options import Option
from gpt2xla.config.suggestions import unknown
from gpt2xla.errors import InputError

# Every run_config.json holds these, even the oldest; a file that a user wrote hardly holds all of them.
_IN_EVERY_RUN = {"checkpoints_dir", "seed", "do_test", "drop_last", "layer_norm_eps", "max_hours", "wandb_notes"}
_EXAMPLE = "write lines such as 'seq_length: 1024'"
_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + kind for kind in "str int float bool null timestamp merge value seq map".split()}


class _Truth(str):
    """An unquoted word that YAML or JSON reads as true or false, as it was written."""


class _Tilde(str):
    """An unquoted ~, which is null in YAML, and a home folder everywhere else."""


class _Pairs(list[tuple[str, Any]]):
    """The keys and values of a mapping, including keys that occur twice."""


# Text, an unquoted true or false, null, a list of these, or a mapping.
_Value = str | None | list[Any]


def read_config_file(file: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the values of the options that `file` sets. Keys may be spelled with dashes; null leaves the default. Raises
    InputError if the file cannot be read, or one of its keys or values is wrong; the message names the key."""
    try:
        pairs = _parse(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"is nested too deeply; {_EXAMPLE}") from None
    found: dict[str, tuple[str, _Value]] = {}
    renamed = {other: name for name, option in options.items() for other in option.other_names}
    for key, value in pairs:
        name = key.replace("-", "_")
        name = renamed.get(name, name)
        if name in found:
            raise InputError(f"{key} is set twice; keep one of the lines")
        found[name] = key, value
    if found.keys() >= _IN_EVERY_RUN:  # it is a run_config.json
        values = _as_set(in_todays_words({name: value for name, (_, value) in found.items()}))
        found = {name: (name, value) for name, value in values.items()}
    read = {name: _read(name, key, value, options) for name, (key, value) in found.items()}
    return {name: value for name, value in read.items() if value is not None}


def in_todays_words(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run_config.json of any age: in older ones null means fp32, and gelu means gelu-exact."""
    renamed = {"mixed_precision": "none"} if saved.get("mixed_precision", "none") is None else {}
    if saved.get("activation") == "gelu":
        renamed["activation"] = "gelu-exact"
    return saved | renamed


def _as_set(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run_config.json without those that follow from others, or that the schedule does not use."""
    followed = {*UNUSED.get(str(saved.get("decay_method")), ())}
    if saved.get("epochs") is not None:
        followed.add("train_steps")
    if saved.get("decay_now") is not None:
        followed |= {"train_steps", "epochs", "decay_steps"}
    return {name: value for name, value in saved.items() if name not in followed}


def _read(name: str, key: str, value: _Value, options: Mapping[str, Option]) -> Any:
    if key == "config":
        raise InputError("a config file cannot name another one")
    option = options.get(name)
    if isinstance(value, _Pairs):
        raise InputError(f"{key} has keys below it; {_flat(value, option)}")
    if option is None:
        switch = options.get(name.removeprefix("no_"))
        raise InputError(
            f"{key} is unknown; write '{switch.name}: false'"
            if switch and switch.is_switch
            else unknown(key, {name: name for name in options})
        )
    if isinstance(value, _Tilde) and option.is_path:
        raise InputError(f"{key}: ~ alone means nothing in YAML; quote it for your home folder, or remove the line")
    if value is None or isinstance(value, _Tilde):
        return None
    words = _words(key, value, option)
    truth = next((word for word in words if isinstance(word, _Truth)), None)
    if truth and not option.is_switch and truth.lower() not in option.aliases:
        meant = "true" if truth.lower() in ("true", "yes", "on") else "false"
        read = "cannot be" if truth.lower() == meant else f"{truth} was read as"
        fix = "quote it if it is text" if option.takes == "text" else f"write {option.takes}"
        raise InputError(f"{key}: {read} {meant}; {fix}")
    try:
        return option.read(words)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from None


def _flat(pairs: _Pairs, option: Option | None) -> str:
    """Return the fix for a key that has keys below it."""
    if option and option.kind == tuple[str, ...]:
        return f"write a list: [{', '.join(f'{name}={part}' for name, part in pairs)}]"
    example = next((f", such as '{name}: {part}'" for name, part in pairs if isinstance(part, str)), "")
    return f"write all options side by side{example}"


def _words(key: str, value: str | list[Any], option: Option) -> list[str]:
    if isinstance(value, str):
        return re.split(r"[,\s]+", value.strip()) if (option.count or 0) > 1 else [value]
    if not value:
        raise InputError(f"{key}: the list is empty; remove the line for the default")
    if not all(isinstance(part, str) for part in value):
        raise InputError(f"{key}: a part of the list is empty, is a list or has keys below it; write {option.takes}")
    if option.joins:
        if odd := next((part for part in value if "," in part or isinstance(part, _Truth)), None):
            raise InputError(
                f"{key}: {odd!r} cannot be one of several; remove commas, and quote yes, no, true and false"
            )
        return [",".join(value)]
    if option.count == 1:
        raise InputError(f"{key}: takes one value, not a list")
    return value


def _parse(contents: bytes) -> _Pairs:
    if not contents.strip(b"\xef\xbb\xbf \t\r\n"):
        raise InputError(f"is empty; {_EXAMPLE}")
    found = _parse_json(contents)
    if found is None:
        found = _parse_yaml(contents)
    if not isinstance(found, _Pairs):
        raise InputError(f"holds no options but {'a list' if isinstance(found, list) else 'text'}; {_EXAMPLE}")
    return found


def _parse_json(contents: bytes) -> Any:
    """Return what the JSON holds, or None if it is not JSON. YAML's reader would refuse JSON's tabs, and its escapes of
    characters past U+FFFF."""
    try:
        found = json.loads(contents, object_pairs_hook=_Pairs, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError:
        return None
    return _Pairs((key, _from_json(value)) for key, value in found) if isinstance(found, _Pairs) else None


def _from_json(value: Any) -> Any:
    if isinstance(value, bool):
        return _Truth("true" if value else "false")
    if isinstance(value, list) and not isinstance(value, _Pairs):
        return [_from_json(part) for part in value]
    return value


def _parse_yaml(contents: bytes) -> Any:
    try:
        documents = list(yaml.compose_all(contents, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        tab = "; use spaces instead of tabs" if "'\\t'" in str(error.problem) else ""
        raise InputError(f"is not YAML: {where}{error.problem}{tab}") from None
    except (yaml.YAMLError, ValueError):  # bytes that are not text
        raise InputError("is not a text file in UTF-8; save it as one") from None
    if len(documents) > 1:
        raise InputError("holds several documents, separated by ---; keep one")
    if not documents or documents[0] is None:  # every line is a comment
        return _Pairs()
    top = documents[0]
    if not isinstance(top, yaml.MappingNode):
        return [] if isinstance(top, yaml.SequenceNode) else ""
    return _Pairs(_pairs(top))


def _pairs(mapping: yaml.MappingNode) -> Iterator[tuple[str, _Value]]:
    for key, value in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(
                f"is not YAML that holds options: line {key.start_mark.line + 1} begins with no name; {_EXAMPLE}"
            )
        yield key.value, _from_yaml(key.value, value, depth=0)


def _from_yaml(key: str, node: yaml.Node, depth: int) -> _Value:
    if node.tag not in _TAGS:
        raise InputError(f"is not YAML that holds options: {key} has the tag {node.tag}; write the value without it")
    if isinstance(node, yaml.ScalarNode):
        if node.tag == f"{_TAG}null":
            return _Tilde("~") if node.value == "~" else None
        return _Truth(node.value) if node.tag == f"{_TAG}bool" else node.value
    if depth > 1:
        raise InputError(f"{key} is nested too deeply; {_EXAMPLE}")
    if isinstance(node, yaml.SequenceNode):
        return [_from_yaml(key, part, depth + 1) for part in node.value]
    return _Pairs((str(name.value), _from_yaml(key, part, depth + 1)) for name, part in node.value)
