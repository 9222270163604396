"""Conversations: who said what, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]
LossOn = Literal["all-answers", "last-answer"]


class Message(NamedTuple):
    """What one side says in one turn. `trained` is False for an answer that is only there to be read."""

    role: Role
    content: str
    trained: bool = True


Conversation = tuple[Message, ...]


def trained_answers(messages: Sequence[Message], loss_on: LossOn) -> list[int]:
    """Return the numbers of the assistant's messages that are trained on."""
    found = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
    return found[-1:] if loss_on == "last-answer" else found


def with_system(messages: Conversation, system: str | None) -> Conversation:
    """Return the conversation with this system message at its start, unless it has one or `system` is none."""
    has_one = any(message.role == "system" for message in messages)
    return messages if not system or has_one else (Message("system", system), *messages)
