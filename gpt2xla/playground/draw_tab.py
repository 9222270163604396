"""Draw: a word becomes pictures."""

from __future__ import annotations

import gradio as gr

from gpt2xla.playground.models import Models


def tab(models: Models, chosen: gr.Dropdown) -> None:
    """Fill the tab; `chosen` holds the name of the model."""
