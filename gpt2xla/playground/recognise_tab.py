"""Recognise: a drawing becomes the words that it may show."""

from __future__ import annotations

import gradio as gr

from gpt2xla.playground.models import Models


def tab(models: Models, chosen: gr.Dropdown) -> None:
    """Fill the tab; `chosen` holds the name of the model."""
