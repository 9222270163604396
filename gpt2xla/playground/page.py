"""The page: the choice of a model, and a tab for each thing to do with it."""

from __future__ import annotations

import gradio as gr

from gpt2xla.playground import chat_tab, draw_tab, inside_tab, recognise_tab, runs_tab, write_tab
from gpt2xla.playground.events import QUIET
from gpt2xla.playground.models import Models

_WAITING = 64  # visitors who may wait for their turn
# Fonts of the visitor's own system: none is fetched.
THEME = gr.themes.Base(
    primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)


def page(models: Models) -> gr.Blocks:
    """Return the page. The browser makes a tab when it is selected first; those that no model can use are hidden."""
    names = models.names()
    with gr.Blocks(title="gpt2xla playground", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        with gr.Row(elem_id="top"):
            gr.HTML("<h1>gpt2xla playground</h1>", js_on_load=None)
            chosen = gr.Dropdown(names, value=names[0], label="Model", elem_id="model", scale=0, min_width=320)
        with gr.Tabs():
            with gr.Tab("Write", id="write"):
                write_tab.tab(models, chosen)
            with gr.Tab("Chat", id="chat", visible=models.any_chats):
                chat_tab.tab(models, chosen)
            with gr.Tab("Draw", id="draw", visible=models.any_draws):
                draw_tab.tab(models, chosen)
            with gr.Tab("Recognise", id="recognise", visible=models.any_draws):
                recognise_tab.tab(models, chosen)
            with gr.Tab("Look inside", id="inside"):
                inside_tab.tab(models, chosen)
            with gr.Tab("Runs", id="runs", visible=bool(models.runs)):
                runs_tab.tab(models, chosen)

        def refresh(name: str) -> object:
            """Offer the checkpoints that a run has saved since the start, and leave what the visitor may have chosen."""
            found = models.names()
            return gr.Dropdown(found) if name in found else gr.Dropdown(found, value=found[0] if found else None)

        blocks.load(refresh, chosen, chosen, queue=False, **QUIET)
    return blocks.queue(max_size=_WAITING, api_open=False)
