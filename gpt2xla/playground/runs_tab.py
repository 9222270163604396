"""Runs: the curves of the runs that the command line names, while they train too."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gpt2xla.playground.events import QUIET
from gpt2xla.playground.models import Models
from gpt2xla.playground.run_charts import Written, charts_of, when_written

_SECONDS = 3.0  # between looks at the files


def tab(models: Models, chosen: gr.Dropdown) -> None:
    """Fill the tab; it does not depend on the `chosen` model."""
    shown = gr.HTML("", js_on_load=None, elem_id="curves")
    drawn = gr.State(())

    def draw() -> list[Any]:
        now = when_written(models.runs.values())
        return [charts_of(models.runs, now), now]

    def refresh(before: Written) -> list[Any]:
        """Draw again what has been written since."""
        return [gr.skip(), gr.skip()] if when_written(models.runs.values()) == before else draw()

    gr.on(None, draw, None, [shown, drawn], queue=False, **QUIET)
    gr.Timer(_SECONDS).tick(refresh, drawn, [shown, drawn], queue=False, **QUIET)
