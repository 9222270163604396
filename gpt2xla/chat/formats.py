"""The formats in which conversations are published: a record of any of them -> a conversation.

Its keys tell which one a record has. Values that are null count as absent: tables fill missing ones with null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from gpt2xla.chat.conversations import Conversation, Message, Role, trained_answers, with_system
from gpt2xla.errors import InputError

ChatFormat = Literal["auto", "messages", "sharegpt", "alpaca", "dolly", "prompt-completion"]

# The names that data sets use for who speaks.
_ROLES: dict[str, Role] = {role: role for role in get_args(Role)} | dict(
    human="user", gpt="assistant", chatgpt="assistant", bing="assistant", bard="assistant", model="assistant"
)
_ITEM_KEYS = (("role", "content"), ("from", "value"))
_SYSTEM_KEYS = ("system", "system_prompt")  # beside the keys of any format
_SHOWN_KEYS = 12


class _Kind(NamedTuple):
    """A format: the keys that tell it, others that it may have, how it is read, and keys of other formats, whose text would
    be lost."""

    keys: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Conversation]
    foreign: tuple[str, ...] = ()

    def described(self) -> str:
        return ", ".join([*self.keys, *(f"[{key}]" for key in self.optional)])


def conversation_of(record: Any, format: ChatFormat = "auto") -> Conversation:
    """Return the conversation in a record. Raises InputError, without the record's place, if its keys are those of no format
    or of several, or hold text that its format does not read, a role is unknown, something else stands where text should, or
    no answer is trained on."""
    if not isinstance(record, dict):
        raise InputError(f"it is {_kind_of(record)}, not a record with keys; fix or remove it")
    fields = {key: value for key, value in record.items() if value is not None}
    if format == "auto":
        found = [name for name, kind in _KINDS.items() if set(kind.keys) <= fields.keys()]
        if len(found) != 1:
            told = f"its keys ({_keys(fields)}) are those of {' and '.join(found) if found else 'no known format'}"
            choices = "; ".join(f"{name} has {kind.described()}" for name, kind in _KINDS.items())
            fix = f"choose with --format {' or '.join(found)}" if found else "rename them"
            raise InputError(f"{told}; {fix}: {choices}")
        name = found[0]
    else:
        name = format
        if missing := set(_KINDS[name].keys) - fields.keys():
            held = f"it has {_keys(fields)}"
            raise InputError(f"--format {name} needs {', '.join(sorted(missing))}, but {held}; choose another")
    kind = _KINDS[name]
    if lost := [key for key in kind.foreign if fields.get(key)]:
        raise InputError(f"its {lost[0]} would be lost: {name} has {kind.described()}; rename or remove it")
    messages = kind.read(fields)
    if not trained_answers(messages, "all-answers"):
        raise InputError("no message is the assistant's and trained on; remove it")
    system = next((text for key in _SYSTEM_KEYS if (text := _text(fields.get(key, ""), key)).strip()), None)
    return with_system(messages, system)


def messages_of(value: Any) -> Conversation:
    """Return the messages in a list, or in a record that holds it as "messages", whoever speaks last. Raises InputError,
    without the place of the list, as `conversation_of`, and where there are none."""
    fields = value if isinstance(value, dict) else {"messages": value}
    messages = _read_list("messages", {"messages": fields.get("messages")})
    if not messages:
        raise InputError("there are no messages; write at least one, or remove it")
    return messages


def _read_list(key: str, fields: Mapping[str, Any], trained: bool = True) -> Conversation:
    items = fields[key]
    if not isinstance(items, list):
        raise InputError(f"{key} is {_kind_of(items)}, not a list of messages; fix or remove it")
    return tuple(_message(item, f"{key}, message {number}", trained) for number, item in enumerate(items, 1))


def _message(item: Any, where: str, trained: bool) -> Message:
    if isinstance(item, dict):
        item = {key: value for key, value in item.items() if value is not None}
    keys = next((keys for keys in _ITEM_KEYS if isinstance(item, dict) and set(keys) <= item.keys()), None)
    if keys is None:
        held = f"has {_keys(item)}" if isinstance(item, dict) else f"is {_kind_of(item)}"
        raise InputError(f"{where}, {held}, not role and content, nor from and value; fix or remove it")
    speaker, content = item[keys[0]], item[keys[1]]
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise InputError(f"{where}: {keys[0]} {speaker!r} is unknown; known are {', '.join(_ROLES)}")
    if item.get("tool_calls") or item.get("function_call"):
        raise InputError(f"{where} calls tools, which no chat template here writes; remove it")
    if (weight := item.get("weight", 1)) not in (0, 1):
        raise InputError(f"{where}: weight {weight!r}; choose 1, to train on it, or 0")
    return Message(role, _text(content, f"{where}: {keys[1]}"), trained and weight == 1)


def _text(value: Any, where: str) -> str:
    """Return a text, or that of a list of parts that are all text."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    ):
        return "".join(_text(part.get("text"), where) for part in value)
    if not isinstance(value, str):
        raise InputError(f"{where} is {_kind_of(value)}, not text; fix or remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a character (\\ud800 to \\udfff, alone); fix or remove it") from None
    return value


def _read_alpaca(fields: Mapping[str, Any]) -> Conversation:
    """As Stanford Alpaca writes its prompt: the input follows the instruction under a heading of its own."""
    asked = _text(fields["instruction"], "instruction")
    if (given := _text(fields.get("input", ""), "input")).strip():
        asked += f"\n\n### Input:\n{given}"
    return Message("user", asked), Message("assistant", _text(fields["output"], "output"))


def _read_dolly(fields: Mapping[str, Any]) -> Conversation:
    """The context follows the instruction after an empty line."""
    asked = _text(fields["instruction"], "instruction")
    if (given := _text(fields.get("context", ""), "context")).strip():
        asked += f"\n\n{given}"
    return Message("user", asked), Message("assistant", _text(fields["response"], "response"))


def _read_prompt_completion(fields: Mapping[str, Any]) -> Conversation:
    """As TRL reads it: texts or lists of messages. Of lists, what the assistant said in the prompt is not trained on."""
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InputError("prompt and completion must both be text or both be lists of messages; fix or remove it")
    if isinstance(prompt, list):
        return _read_list("prompt", fields, trained=False) + _read_list("completion", fields)
    return Message("user", _text(prompt, "prompt")), Message("assistant", _text(completion, "completion"))


def _keys(fields: Mapping[str, Any]) -> str:
    more = len(fields) - _SHOWN_KEYS
    return (", ".join(list(fields)[:_SHOWN_KEYS]) or "none") + (f" and {more} more" if more > 0 else "")


def _kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


_KINDS = {
    "messages": _Kind(("messages",), (), lambda fields: _read_list("messages", fields)),
    "sharegpt": _Kind(("conversations",), (), lambda fields: _read_list("conversations", fields)),
    "alpaca": _Kind(("instruction", "output"), ("input",), _read_alpaca, ("context", "history")),
    "dolly": _Kind(("instruction", "response"), ("context",), _read_dolly, ("input", "history")),
    "prompt-completion": _Kind(("prompt", "completion"), (), _read_prompt_completion),
}
