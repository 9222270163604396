"""A conversation with a model that has a chat template: what of it the model reads, and how it grows."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2xla.chat.conversations import Conversation, Message, with_system
from gpt2xla.chat.formats import messages_of
from gpt2xla.chat.template import ChatTemplate
from gpt2xla.config import ModelConfig
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError, counted
from gpt2xla.generation.continuation import Prompt
from gpt2xla.generation.prompt_file import Entry, read_lines
from gpt2xla.generation.settings import GenerationSettings


@dataclass(frozen=True)
class Window:
    """As much of a conversation as a model can read: its system message and its newest turns.

    Attributes:
        dropped: how many of the oldest turns do not fit."""

    messages: list[Message]
    prompt: Prompt
    dropped: int

    @property
    def note(self) -> str:
        """What the user should know; "" if nothing was dropped."""
        if not self.dropped:
            return ""
        if self.dropped == 1:
            return "note: the oldest turn of the conversation no longer fits into the model's context and was dropped"
        return f"note: the {self.dropped} oldest turns no longer fit into the model's context and were dropped"


@dataclass(frozen=True)
class ChatReader:
    """Makes prompts of conversations.

    A turn is a message of the user and what follows it up to the next one. Room for the answer is kept in the context:
    `max_new_tokens`, but at most half of it.

    Attributes:
        stop_ids: ids that end an answer.
        system: the message that conversations without a system message begin with; "" for none."""

    template: ChatTemplate
    tokenizer: Tokenizer
    seq_length: int
    max_new_tokens: int
    stop_ids: frozenset[int]
    system: str = ""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        model: ModelConfig,
        settings: GenerationSettings,
        max_new_tokens: int | None,
        system: str,
        name: str,
    ) -> ChatReader:
        """Return the reader for the model `name`, whose answers end where its template and its settings say. By default they
        have a quarter of the context. Raises InputError if the tokenizer has no chat template, the template writes tokens
        that the model lacks, or `system` leaves no room."""
        template = ChatTemplate.of(tokenizer)
        if template is None:
            raise InputError(
                f"--chat: {name} has no chat template, so it was not trained to answer; choose a model that was, or name "
                "its tokenizer that has one with --tokenizer, or leave --chat out"
            )
        used = [*template.prompt_ids(tokenizer, [Message("user", "?")]), *template.stop_ids(tokenizer)]
        if (largest := int(max(used))) >= model.real_vocab_size:
            raise InputError(
                f"--chat: the chat template writes {tokenizer.decode([largest])!r}, id {largest}, and {name} has only "
                f"{model.real_vocab_size} ids; name the tokenizer that it was trained with"
            )
        stop_ids = frozenset(template.stop_ids(tokenizer)) | settings.stop_ids(tokenizer.eot_id)
        longest = max(1, model.seq_length // 4) if max_new_tokens is None else max_new_tokens
        reader = cls(template, tokenizer, model.seq_length, longest, stop_ids, system)
        try:
            reader.prompt("?")
        except InputError as error:
            raise InputError(f"--system: {error}" if system else f"--chat: {error}") from None
        return reader

    @property
    def room(self) -> int:
        """The most tokens that a prompt may have."""
        return self.seq_length - min(self.max_new_tokens, self.seq_length // 2)

    def window(self, messages: Sequence[Message]) -> Window:
        """Return what the model reads to answer the last of `messages`. Raises InputError if not even that one fits."""
        system = list(itertools.takewhile(lambda message: message.role == "system", messages))
        rest = messages[len(system) :]
        starts = [number for number, message in enumerate(rest) if message.role == "user"]
        for dropped, start in enumerate([0, *starts[1:]]):
            kept = [*system, *rest[start:]]
            ids = self.template.prompt_ids(self.tokenizer, kept).tolist()
            if len(ids) <= self.room:
                longest = min(self.max_new_tokens, self.seq_length - len(ids))
                return Window(kept, Prompt(ids, longest, hidden_ids=len(ids)), dropped)
        beside = " together with the system message" if system else ""
        raise InputError(
            f"a message is too long: {counted(len(ids), 'token')}{beside}, and {self.room} fit into the model's context of "
            f"{self.seq_length} beside an answer; shorten it, or choose a smaller --max-new-tokens"
        )

    def prompt(self, question: str) -> Prompt:
        """Return the prompt of a conversation's first message. Raises InputError if it does not fit."""
        return self.asked(with_system((), self.system), question).prompt

    def asked(self, messages: Sequence[Message], question: str) -> Window:
        """Return what the model reads to answer a question after `messages`, without the blanks around it where the template
        cannot write these. Raises InputError as `window`."""
        try:
            return self.window([*messages, Message("user", question)])
        except InputError:
            if question == question.strip():
                raise
            return self.window([*messages, Message("user", question.strip())])

    def entries(self, file: Path) -> list[Entry]:
        """Return the conversations of a file, each a line of JSON: a list of messages, {role, content}, or an object that
        holds it as "messages". What does not fit is dropped, with a note. Raises InputError if a line is something else, or
        its last message does not fit."""
        return [self._entry(line, f"--prompts-file {file}, line {number}") for number, line in read_lines(file)]

    def _entry(self, line: str, where: str) -> Entry:
        try:
            messages = _messages(line)
            window = self.window(with_system(messages, self.system))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if window.note:
            print(f"{where}: {window.note}", file=sys.stderr)
        return {"messages": [{"role": m.role, "content": m.content} for m in messages]}, window.prompt

    def kept(self, messages: Sequence[Message], answer: str) -> str:
        """Return the answer to `messages` as the template can write it: some templates trim blanks around it."""
        try:
            self.template.prompt_ids(self.tokenizer, [*messages, Message("assistant", answer)])
        except InputError:
            return answer.strip()
        return answer


class Dialogue:
    """A conversation while it grows.

    Attributes:
        messages: what the model reads of it with the next question."""

    def __init__(self, reader: ChatReader) -> None:
        self._reader = reader
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(with_system((), self._reader.system))

    def asked(self, question: str) -> Window:
        """Add a message of the user. Turns that no longer fit are forgotten. Raises InputError if it cannot be added; the
        conversation is unchanged then."""
        window = self._reader.asked(self.messages, question)
        self.messages = window.messages
        return window

    def answered(self, answer: str) -> None:
        """Add the answer to the last question, or remove the question if the answer is empty."""
        if answer.strip():
            self.messages.append(Message("assistant", self._reader.kept(self.messages, answer)))
        else:
            self.messages.pop()


def _messages(line: str) -> Conversation:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        example = '[{"role": "user", "content": "Hello"}]'
        raise InputError(f"it is not JSON; write a list of messages such as {example}") from None
    messages = messages_of(value)
    if (last := messages[-1].role) in ("assistant", "system"):
        raise InputError(f"the last message is the {last}'s; end with one to be answered")
    return messages
