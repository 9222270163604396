"""Chat: a conversation with a model that was trained to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import gradio as gr

from gpt2xla.chat.conversations import Message, with_system
from gpt2xla.errors import InputError
from gpt2xla.generation.continuation import Continuation
from gpt2xla.playground.controls import LONGEST_TEXT, asked, check_length, controls
from gpt2xla.playground.events import QUIET, on_turn
from gpt2xla.playground.models import Models
from gpt2xla.playground.writing import continued


class Talk(NamedTuple):
    """A conversation: the messages as they are shown, and those that the model reads, without a system message."""

    shown: tuple[dict[str, str], ...] = ()
    read: tuple[Message, ...] = ()

    def with_turn(self, role: str, content: str, read: Sequence[Message]) -> Talk:
        return Talk((*self.shown, {"role": role, "content": content}), tuple(read))


def tab(models: Models, chosen: gr.Dropdown) -> None:
    """Fill the tab; `chosen` holds the name of the model."""
    said = gr.State(Talk())
    shown = gr.Chatbot(
        show_label=False, height="max(280px, 100vh - 420px)", buttons=["copy"], latex_delimiters=[], render_markdown=False,
        feedback_options=None, placeholder="Say something to the model.", elem_id="conversation",
    )  # fmt: skip
    with gr.Row(elem_classes="buttons"):
        question = gr.Textbox(
            placeholder="Message", lines=1, max_lines=8, max_length=LONGEST_TEXT, scale=1, min_width=200, container=False,
            show_label=False, elem_id="question",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", size="md", scale=0, min_width=80)
        stop = gr.Button("Stop", size="md", scale=0, min_width=80)
        reset = gr.Button("Start again", size="md", scale=0, min_width=80)
    note = gr.HTML("", js_on_load=None)
    with gr.Accordion("System message", open=False):
        system = gr.Textbox(show_label=False, placeholder="None", lines=2, max_length=LONGEST_TEXT)
    settings = controls(max_new_tokens=256)
    on_turn(
        models, [send.click, question.submit], partial(answer, models), [chosen, question, said, system, *settings],
        [question, shown, said, note], start=send, stop=stop, show_progress_on=[shown],
    )  # fmt: skip
    gr.on([reset.click, shown.clear], lambda: [[], Talk(), ""], None, [shown, said, note], queue=False, **QUIET)


def answer(models: Models, name: str, words: str, talk: Talk, system: str, *values: Any) -> Iterator[list[Any]]:
    """Yield, while the model `name` answers, the emptied box, the messages to show, the conversation and a note."""
    request = asked(*values)
    if not check_length(words or "").strip():
        raise InputError("the message is empty; write one")
    with models.opened(name) as opened:
        if opened.chat is None:
            raise InputError(f"{name} was not trained to chat; choose another model, or the tab Write")
        reader = dataclasses.replace(opened.chat, max_new_tokens=request.max_new_tokens)
        window = reader.asked(with_system(talk.read, check_length(system or "").strip()), words)
        asks = talk.with_turn("user", words, read=[m for m in window.messages if m.role != "system"])
        text = Continuation(
            opened.tokenizer, window.prompt.ids, request.stop, window.prompt.hidden_ids, window.prompt.max_new_tokens
        )
        notes = [window.note.removeprefix("note: ")] if window.note else []
        yield ["", [*asks.shown], talk, _note(notes)]
        now = talk

        def with_answer(words: str) -> Talk:
            return asks.with_turn("assistant", text.text, read=[*asks.read, Message("assistant", words)])

        for _ in continued(opened, text, window.prompt, request, reader.stop_ids):
            if words_so_far := text.text.strip():  # which every template can write, if the answer is stopped here
                now = with_answer(words_so_far)
                yield ["", [*now.shown], now, _note(notes)]
        if now is not talk:
            now = with_answer(reader.kept(window.messages, text.text))
        elif not text.is_cut:
            notes.append("the model ended its answer at once")  # which is then as if nothing had been asked
        if text.is_cut:
            notes.append("the answer was cut: it has all the tokens that it may have")
        yield ["", [*now.shown], now, _note(notes)]


def _note(notes: Sequence[str]) -> str:
    return f'<p class="note">{". ".join(notes)}</p>' if notes else ""
