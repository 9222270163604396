"""Look inside: what a model computes along a text, and beside it another one, such as an earlier checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError
from gpt2xla.evals.inside import most_tokens
from gpt2xla.generation.continuation import Continuation, Prompt
from gpt2xla.generation.prompt_file import TextReader
from gpt2xla.playground.controls import LONGEST_TEXT, asked, check_length
from gpt2xla.playground.events import QUIET, on_turn
from gpt2xla.playground.heat_maps import heat_maps
from gpt2xla.playground.looking import Look, look, side_by_side
from gpt2xla.playground.models import Models, Opened
from gpt2xla.playground.writing import continued

_NONE = "no other"
_EMPTY = '<p class="note">Point at a token, or tap it, to see what the model thought likely in its place.</p>'


def tab(models: Models, chosen: gr.Dropdown) -> None:
    """Fill the tab; `chosen` holds the name of the model."""
    looks = gr.State(())
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            text = gr.Textbox(
                "one two three one two three one two three", label="Text", lines=4, max_lines=12, elem_id="text",
                max_length=LONGEST_TEXT, info="special tokens in it, such as <|endoftext|>, are read as tokens",
            )  # fmt: skip
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Look inside", variant="primary", size="md", scale=0, min_width=80)
                more = gr.Button("Continue", size="md", scale=0, min_width=80)
                stop = gr.Button("Stop", size="md", scale=0, min_width=80)
        with gr.Column(scale=2, min_width=300):
            other = gr.Dropdown([_NONE], value=_NONE, label="Compare with", elem_id="other")
            count = gr.Slider(1, 256, 60, step=1, label="New tokens")
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature")
    seen = gr.HTML(_EMPTY, js_on_load=None, elem_id="seen")
    layer = gr.Slider(1, 2, 1, step=1, label="Attention in layer", visible=False, elem_id="layer")
    maps = gr.HTML("", js_on_load=Path(__file__).with_name("heat_maps.js").read_text(), elem_id="attention")
    shown = [text, seen, layer, maps, looks]

    def look_at(name: str, beside: str, words: str, number: int) -> Iterator[list[Any]]:
        """Yield what `shown` shows, model by model."""
        yield from _in_each(models, [name, beside], words, number)

    def go_on(name: str, beside: str, words: str, number: int, count: int, temperature: float) -> Iterator[list[Any]]:
        """Yield the text as it grows, then what `look_at` yields."""
        request, ids = asked(temperature, count, 0, 1.0, 1.0, None, ""), []
        with models.opened(name) as opened:
            reader = _reader(opened)
            prompt = reader.prompt(check_length(words or ""))
            room = most_tokens(opened.model) - len(prompt.ids)
            if room <= 0:
                raise InputError(f"the text has {len(prompt.ids):,} tokens; shorten it to continue it")
            prompt = Prompt(prompt.ids, min(request.max_new_tokens, room), prompt.hidden_ids)
            new = Continuation(reader.tokenizer, prompt.ids, (), prompt.hidden_ids, prompt.max_new_tokens)

            def watch(row: int, logits_V: Tensor, token: int) -> None:
                if token not in reader.stop_ids:
                    ids.append(token)

            for _ in continued(opened, new, prompt, request, reader.stop_ids, watch):
                words = new.prompt + new.text
                yield [words, *[gr.skip()] * 4]
            known = ([*prompt.ids, *ids], opened.tokenizer)
        yield from _in_each(models, [name, beside], words, number, known)

    places = [chosen, other, text, layer]
    on_turn(models, [start.click], look_at, places, shown, start=start, stop=stop)
    on_turn(models, [more.click], go_on, [*places, count, temperature], shown, start=more, stop=stop)
    layer.input(heat_maps, [looks, layer], maps, queue=False, trigger_mode="always_last", **QUIET)
    gr.on(None, lambda name: gr.Dropdown([_NONE, *models.names()]), chosen, other, queue=False, **QUIET)


def _reader(opened: Opened) -> TextReader:
    return TextReader(opened.tokenizer, opened.config, opened.settings, None, "as-ids", "the text")


def _in_each(
    models: Models, names: Sequence[str], text: str, layer: int, known: tuple[Sequence[int], Tokenizer] | None = None
) -> Iterator[list[Any]]:
    """Yield the page after each model that has read the text. `known` are its ids, which a model wrote, and the tokenizer
    that they are of: the text alone may be cut into others."""
    if not check_length(text or ""):
        raise InputError("the text is empty; write some")
    looks: list[Look] = []
    for name in dict.fromkeys(name for name in names if name != _NONE):
        with models.opened(name) as opened:
            reader = _reader(opened)
            same = known is not None and known[1].sha256 == opened.tokenizer.sha256
            ids = known[0] if known and same else reader.prompt(text).ids
            looks.append(look(opened, ids, reader.tokenizer))
        layers = max(len(one.attention) for one in looks)
        slider = gr.Slider(maximum=max(2, layers), value=min(layer, layers), visible=layers > 1)
        yield [text, side_by_side(looks), slider, heat_maps(looks, layer), (*looks,)]
