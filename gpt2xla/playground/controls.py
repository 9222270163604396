"""The settings of a text, as the page shows them and as generation takes them."""

from __future__ import annotations

import re
import secrets
from typing import Any, NamedTuple

import gradio as gr

from gpt2xla.errors import InputError
from gpt2xla.generation.sampling import USUAL, SamplingConfig

LONGEST_TEXT = 50_000  # characters that a visitor may send
_MOST_TOKENS = 1024  # that a visitor may ask for at once
_MOST_STOPS = 20


class Asked(NamedTuple):
    """The settings that a visitor chose."""

    sampling: SamplingConfig
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int


def controls(max_new_tokens: int = 100, *, of_text: bool = True) -> list[gr.components.Component]:
    """Make the settings, folded away, and return the components whose values `asked` takes. If they are not `of_text`, those
    that pictures have no use for are hidden."""
    with gr.Accordion("Settings", open=False):
        temperature = gr.Slider(0, 2, USUAL.temperature, step=0.05, label="Temperature", info="0: always the likeliest")
        longest = gr.Slider(
            1, _MOST_TOKENS, max_new_tokens, step=1, label="New tokens", info="at most", visible=of_text
        )
        top_k = gr.Slider(0, 200, USUAL.top_k, step=1, label="Top k", info="draw from so many tokens; 0: from all")
        top_p = gr.Slider(0.05, 1, USUAL.top_p, step=0.05, label="Top p", info="from the likeliest with this share")
        penalty = gr.Slider(
            1, 2, USUAL.repetition_penalty, step=0.05, label="Repetition penalty", info="1: none", visible=of_text
        )
        # Gradio's box for numbers makes no number a 0.
        seed = gr.Textbox(label="Seed", placeholder="a new one each time", max_length=16)
        stop = gr.Textbox(label="Stop before", info="texts, one a line", lines=2, max_length=2_000, visible=of_text)
    return [temperature, longest, top_k, top_p, penalty, seed, stop]


def asked(*values: Any) -> Asked:
    """Return what the values of `controls` mean; without a seed, a new one. Raises InputError."""
    temperature, longest, top_k, top_p, penalty, seed, stop = values
    sampling = SamplingConfig(float(temperature), int(top_k), float(top_p), float(penalty))
    sampling.check()
    if not 1 <= longest <= _MOST_TOKENS:
        raise InputError(f"new tokens {longest}: choose a number from 1 to {_MOST_TOKENS}")
    stops = tuple(line for line in (stop or "").splitlines() if line)
    if len(stops) > _MOST_STOPS:
        raise InputError(f"there are {len(stops)} texts to stop before; give at most {_MOST_STOPS}")
    if (seed := (seed or "").strip()) and not re.fullmatch("[0-9]{1,16}", seed):
        raise InputError(f"seed {seed[:20]!r}: write a whole number of at least 0, or nothing")
    return Asked(sampling, int(longest), stops, int(seed) if seed else secrets.randbelow(10**9))


def check_length(text: str) -> str:
    """Return `text`. Raises InputError if it is longer than a visitor's may be."""
    if len(text) > LONGEST_TEXT:
        raise InputError(f"the text has {len(text):,} characters; shorten it to {LONGEST_TEXT:,}")
    return text
