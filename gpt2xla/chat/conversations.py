"""Conversations: who said what, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gpt2xla.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]


class Message(NamedTuple):
    """What one side says in one turn."""

    role: Role
    content: str


Conversation = tuple[Message, ...]


def answers(messages: Sequence[Message]) -> list[int]:
    """Return the numbers of the assistant's messages."""
    return [number for number, message in enumerate(messages) if message.role == "assistant"]


def check(messages: Sequence[Message]) -> None:
    """Raise InputError unless it is a conversation to train on: the assistant answers someone."""
    if not answers(messages):
        raise InputError("no message is the assistant's, so there is nothing to learn; remove the record")
    if messages[0].role == "assistant" or not any(message.role == "user" for message in messages):
        raise InputError("the assistant speaks first; begin with a user message, or remove the record")
