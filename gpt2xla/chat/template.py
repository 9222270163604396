"""Chat templates: a conversation -> the token ids of a model's input, and which of them are the assistant's own.

The ids are put together from two kinds of text. Special tokens that the template spells become their ids; what a message
says is always encoded as letters, so that no message can forge a role or an end. Where messages spell no special token,
ids and mask are those of transformers' `apply_chat_template(..., return_assistant_tokens_mask=True)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.chat.built_in import TEMPLATES
from gpt2xla.chat.conversations import Conversation, LossOn, Message, trained_answers
from gpt2xla.data.special_tokens import shortened
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError, in_one_line

# Stand for the messages in a first rendering; private-use characters, which no template writes.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")
_MARKER = re.compile(r"<\|[^|<>\s]+\|>")  # what templates write special tokens as
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Every tokenizer merges the second word with a space before it, so that a prompt which ends in a space is noticed.
_TURNS: Conversation = (Message("user", "Hello"), Message("assistant", "the"))
_TRIALS: tuple[Conversation, ...] = (
    _TURNS * 2,
    (Message("system", "S"), *_TURNS),
    (*_TURNS, Message("tool", "T"), *_TURNS),
)


class Place(NamedTuple):
    """Where the text of message number `message` stands in a rendering, in characters."""

    message: int
    start: int
    end: int


class _Piece(NamedTuple):
    """A part of a rendering: the special token `id`, or text if that is None."""

    start: int
    end: int
    id: int | None


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    Attributes:
        text: what the template makes of it.
        places: where each message stands, in the order of the text.
        spans: start and end of what stands in {% generation %} blocks.
    """

    text: str
    places: tuple[Place, ...]
    spans: tuple[tuple[int, int], ...]

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield start and end of what the template itself writes, between the messages."""
        end = 0
        for place in self.places:
            yield end, place.start
            end = place.end
        yield end, len(self.text)

    def specials(self, tokenizer: Tokenizer) -> Iterator[_Piece]:
        """Yield the special tokens that the template writes. Raises InputError if the tokenizer lacks one."""
        known = sorted((token for token, is_special in tokenizer.added.items() if is_special), key=len, reverse=True)
        pattern = re.compile("|".join([*map(re.escape, known), _MARKER.pattern]))
        for start, end in self.gaps():
            for found in pattern.finditer(self.text, start, end):
                if found.group() not in tokenizer.added:
                    raise lacks(tokenizer, [found.group()])
                yield _Piece(*found.span(), tokenizer.backend.token_to_id(found.group()))

    def pieces(self, tokenizer: Tokenizer) -> Iterator[_Piece]:
        """Yield special tokens and the text between them. Template and messages are one text there: a merge may cross the
        border, as in transformers."""
        end = 0
        for special in self.specials(tokenizer):
            if special.start > end:
                yield _Piece(end, special.start, None)
            yield special
            end = special.end
        if end < len(self.text):
            yield _Piece(end, len(self.text), None)


def lacks(tokenizer: Tokenizer, tokens: Sequence[str]) -> InputError:
    """Return the error about special tokens of a template that the tokenizer does not have."""
    fix = "prepare_chat.py --add-special-tokens adds them; a model without them is then trained with --resize-vocab"
    return InputError(f"tokenizer {tokenizer.name} lacks {', '.join(tokens)}, which the chat template writes; {fix}")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template as transformers knows them: Jinja text, run in its sandbox.

    Attributes:
        source: the Jinja text, with {% generation %} around what the model is to say, its end included.
        name: what messages call it.
    """

    source: str
    name: str

    @classmethod
    def named(cls, name: str) -> ChatTemplate:
        """Return the template "chatml" or "alpaca", or that of a file. Raises InputError if there is no such template, or
        nothing in it can be trained on."""
        what = f"--chat-template {name}"
        if name in TEMPLATES:
            return cls(TEMPLATES[name], what)
        try:
            source = Path(name).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(f"{what}: neither {', '.join(TEMPLATES)} nor a file of text ({why})") from None
        if not _GENERATION.search(source):
            fix = "write {% generation %} before and {% endgeneration %} after what the assistant says and its end"
            raise InputError(f"{what}: it does not mark the answers, which are trained on; {fix}")
        return cls(source, what)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Return the tokenizer's own template, or None if it has none."""
        text = tokenizer.chat_template
        return None if text is None else cls(text, f"the chat template of {tokenizer.name}")

    def fitted(self, tokenizer: Tokenizer) -> ChatTemplate:
        """Return the template with the end-of-text token in front, as every document here begins, unless it writes that.

        Raises InputError if the tokenizer lacks special tokens or an end of text, answers are not marked with their end, a
        prompt for an answer is not how the answer's conversation begins, or transformers would encode another way."""
        if missing := self.missing_tokens(tokenizer, (_TURNS,)):
            raise lacks(tokenizer, missing)
        if tokenizer.eot_id is None:
            raise InputError(f"--tokenizer {tokenizer.name} has no end-of-text token; choose one that has an eos_token")
        ids, _ = self.encode(tokenizer, _TURNS)
        rendering = self.render(tokenizer, _TURNS)
        matched = [token for token, is_special in tokenizer.added.items() if not is_special]
        written = " ".join(rendering.text[start:end] for start, end in rendering.gaps())
        if spelled := [token for token in matched if token in written]:
            fix = f"which any message could spell; mark it as special in the tokenizer {tokenizer.name}"
            raise InputError(f"{self.name} writes {spelled[0]}, {fix}")
        theirs = tokenizer.reading_special_tokens().backend.encode(rendering.text, add_special_tokens=False).ids
        if theirs != ids.tolist():
            why = "it takes text near special tokens as a part of them, or never reads these"
            raise InputError(f"--tokenizer {tokenizer.name}: transformers encodes {self.name} in another way: {why}")
        prompt = self.prompt_ids(tokenizer, _TURNS[:-1])
        if not np.array_equal(prompt, ids[: len(prompt)]):
            fix = "write with add_generation_prompt what comes before the assistant's words"
            written = self.render(tokenizer, _TURNS[:-1], add_generation_prompt=True).text
            if written == rendering.text[: rendering.places[-1].start]:
                end = written[len(written.rstrip()) :]
                fix = f"the tokenizer merges its end, {end!r}, with the answer; end it before that, or with a special token"
            raise InputError(f"{self.name} prompts for an answer in another way than answers begin; {fix}")
        if ids[0] == tokenizer.eot_id:
            return self
        end_of_text = json.dumps(tokenizer.special_tokens["eos_token"])
        return ChatTemplate(f"{{{{- {end_of_text} }}}}{self.source}", self.name)

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], loss_on: LossOn = "all-answers"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a conversation, (T,), and which of them are trained on, (T,) of bool: the assistant's words and
        the token that ends its turn. Raises InputError if the template changes or loses what a message says, marks
        something else for training, or the tokenizer lacks its special tokens."""
        rendering = self.render(tokenizer, messages)
        spans = self._answer_spans(tokenizer, messages, rendering)
        ids, offsets = self._ids(tokenizer, rendering)
        trained = np.zeros(len(ids), dtype=bool)
        for answer in trained_answers(messages, loss_on):
            start, end = spans[answer]
            trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return ids, trained

    def prompt_ids(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
        """Return the ids of a conversation up to where the assistant's next answer begins, (T,). Raises as `encode`."""
        return self._ids(tokenizer, self.render(tokenizer, messages, add_generation_prompt=True))[0]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the ids that end an answer: the token that the template writes after it, then the end of text."""
        rendering = self.render(tokenizer, _TURNS)
        end = _end(rendering, rendering.specials(tokenizer), len(rendering.places) - 1)
        found = [end.id if end else None, tokenizer.eot_id]
        return tuple(dict.fromkeys(id for id in found if id is not None))

    def missing_tokens(self, tokenizer: Tokenizer, trials: Sequence[Conversation] = _TRIALS) -> list[str]:
        """Return the special tokens that the template writes, in any of these conversations, and the tokenizer lacks."""
        found: dict[str, None] = {}
        for trial in trials:
            try:
                rendering = self.render(tokenizer, trial, add_generation_prompt=True)
            except InputError:
                continue  # it has no place for such messages
            texts = (rendering.text[start:end] for start, end in rendering.gaps())
            found |= dict.fromkeys(token for text in texts for token in _MARKER.findall(text))
        return [token for token in found if token not in tokenizer.added]

    def render(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> Rendering:
        """Return a conversation as text. Raises InputError if the template fails, or changes or loses a message's text."""
        stand_ins = [Message(message.role, f"\ue000{number}\ue001") for number, message in enumerate(messages)]
        parts = _STAND_IN.split(self._rendered(tokenizer, stand_ins, add_generation_prompt)[0])
        text, spans = self._rendered(tokenizer, messages, add_generation_prompt)
        numbers, expected, places = [int(number) for number in parts[1::2]], parts[0], []
        if max(numbers, default=0) >= len(messages):
            raise InputError(f"{self.name} writes U+E000, which marks messages here; take another character")
        for number, after in zip(numbers, parts[2::2], strict=True):
            start = len(expected)
            expected += messages[number].content
            places.append(Place(number, start, len(expected)))
            expected += after
        lost = set(range(len(messages))) - {place.message for place in places}
        if lost or expected != text:
            number = min(lost) if lost else _first_changed(expected, text, places)
            role, content = messages[number].role, messages[number].content
            effect = "leaves out" if lost else "changes"
            fix = "correct the template, or the record (templates may trim blanks, or leave out what is empty)"
            said = f"message {number + 1}, the {role}'s {shortened(content)!r}"
            raise InputError(f"{self.name} {effect} {said}; {fix}")
        return Rendering(text, tuple(places), spans)

    def _rendered(
        self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        # Importing transformers takes 2 s, which --help need not wait for.
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{"role": message.role, "content": message.content} for message in messages]
        marks = bool(_GENERATION.search(self.source))
        try:
            texts, spans = render_jinja_template(
                [chat], chat_template=self.source, return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt, **tokenizer.special_tokens,
            )  # fmt: skip
        except Exception as error:  # a template may fail in any way
            raise InputError(f"{self.name}: {in_one_line(error)}") from None
        return texts[0], tuple(spans[0]) if marks else ()

    def _ids(self, tokenizer: Tokenizer, rendering: Rendering) -> tuple[np.ndarray, np.ndarray]:
        """Return ids, (T,), and where each stands in the text, (T, 2)."""
        pieces = list(rendering.pieces(tokenizer))
        texts = [rendering.text[piece.start : piece.end] for piece in pieces if piece.id is None]
        encoded = iter(tokenizer.backend.encode_batch(texts, add_special_tokens=False))
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for piece in pieces:
            if piece.id is None:
                encoding = next(encoded)
                ids += encoding.ids
                offsets += [(piece.start + start, piece.start + end) for start, end in encoding.offsets]
            else:
                ids.append(piece.id)
                offsets.append((piece.start, piece.end))
        return np.array(ids, dtype=tokenizer.dtype), np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def _answer_spans(
        self, tokenizer: Tokenizer, messages: Sequence[Message], rendering: Rendering
    ) -> dict[int, tuple[int, int]]:
        """Return the {% generation %} span of each answer, by the number of its message. Raises InputError unless each span
        holds one answer with its end, and no other message."""
        spans: dict[int, tuple[int, int]] = {}
        specials = list(rendering.specials(tokenizer))
        for order, place in enumerate(rendering.places):
            role = messages[place.message].role
            if role != "assistant":
                if any(start < place.end and place.start < end for start, end in rendering.spans):
                    fix = "keep the assistant's words alone in it"
                    raise InputError(f"{self.name} has the {role}'s words in {{% generation %}}; {fix}")
                continue
            end = _end(rendering, specials, order)
            if end is None:
                fix = "write {{ eos_token }} or another special token after it"
                raise InputError(f"{self.name} writes no special token after an answer, so that none would end; {fix}")
            around = next((span for span in rendering.spans if span[0] <= place.start and end.end <= span[1]), None)
            if around is None:
                fix = f"put both between {{% generation %}} and {{% endgeneration %}}: {rendering.text[end.start : end.end]}"
                raise InputError(f"{self.name} does not mark an answer and the token that ends it; {fix}")
            if around in spans.values():
                raise InputError(f"{self.name} has several answers in one {{% generation %}}; give each its own")
            spans[place.message] = around
        return spans


def _end(rendering: Rendering, specials: Iterable[_Piece], order: int) -> _Piece | None:
    """Return the special token that ends a message, the `order`-th in the text: the first between it and the next one."""
    start = rendering.places[order].end
    limit = rendering.places[order + 1].start if order + 1 < len(rendering.places) else len(rendering.text)
    return next((special for special in specials if start <= special.start and special.end <= limit), None)


def _first_changed(expected: str, text: str, places: Sequence[Place]) -> int:
    """Return the number of the message at, or else after, which the two texts begin to differ."""
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, text, strict=False)) if a != b), min(len(expected), len(text))
    )
    return next((place.message for place in places if same <= place.end), places[-1].message)
