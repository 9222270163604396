"""Write: a text that the model continues, and how likely it thought each token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from gpt2xla.errors import counted
from gpt2xla.generation.continuation import Continuation
from gpt2xla.generation.prompt_file import TextReader
from gpt2xla.playground.controls import LONGEST_TEXT, Asked, asked, check_length, controls
from gpt2xla.playground.events import on_turn
from gpt2xla.playground.models import Models
from gpt2xla.playground.writing import ShadedText, continued

_EMPTY = (
    '<div class="written empty">The text appears here. New tokens are shaded by how unlikely the model thought them; '
    "point at one, or tap it, to see the likeliest.</div>"
)


def tab(models: Models, chosen: gr.Dropdown) -> None:
    """Fill the tab; `chosen` holds the name of the model."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                "Once upon a time", label="Prompt", lines=4, max_lines=12, max_length=LONGEST_TEXT, elem_id="prompt"
            )
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Write", variant="primary", size="md", scale=0, min_width=80)
                stop = gr.Button("Stop", size="md", scale=0, min_width=80)
            settings = controls()
        with gr.Column(scale=3, min_width=300):
            text = gr.HTML(_EMPTY, js_on_load=None, elem_id="written", show_label=False)
    on_turn(models, [start.click], partial(write, models), [chosen, prompt, *settings], [text], start=start, stop=stop)


def write(models: Models, name: str, beginning: str, *values: Any) -> Iterator[str]:
    """Yield a text as HTML while the model `name` writes it. `values` are those of `controls`."""
    request = asked(*values)
    notes: list[str] = []
    with models.opened(name) as opened:
        reader = TextReader(
            opened.tokenizer, opened.config, opened.settings, request.max_new_tokens, "as-text", "the prompt",
            notes.append,
        )  # fmt: skip
        begun = reader.prompt(check_length(beginning or ""))
        new = Continuation(opened.tokenizer, begun.ids, request.stop, begun.hidden_ids, begun.max_new_tokens)
        page = ShadedText(opened.tokenizer, new.prompt)
        yield page.html
        for piece in continued(opened, new, begun, request, reader.stop_ids, page.watch):
            page.add(piece)
            yield page.html
        page.end(". ".join([_ending(new, request), *notes]), shows_end=not new.stopped)
        yield page.html


def _ending(text: Continuation, request: Asked) -> str:
    """Return how a text ended, and what gives it again."""
    how = "cut" if text.is_cut else "ended before a stop text" if text.stopped else "ended by itself"
    drawn = f", seed {request.seed}" if request.sampling.temperature else ""
    return f"{counted(text.tokens, 'token')}, {how}{drawn}"
