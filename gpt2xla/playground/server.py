"""Serves the page from this machine alone: nothing is asked from elsewhere, measured, shared or read from files."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import webbrowser
from pathlib import Path

from gpt2xla.playground.address import Address
from gpt2xla.playground.models import Models

_UPLOAD = "8mb"  # the largest picture that may be pasted or dropped


def serve(models: Models, address: Address, *, opens_browser: bool = False) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="playground-") as uploads:
        _settle_gradio(uploads)
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI

        from gpt2xla.playground.guard import Guard
        from gpt2xla.playground.page import THEME, page

        app = gr.mount_gradio_app(
            FastAPI(openapi_url=None), page(models), "/", theme=THEME, css_paths=sorted(Path(__file__).parent.glob("*.css")),
            footer_links=[], run_history=False, allowed_paths=[], max_file_size=_UPLOAD, show_error=False,
            ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        )  # fmt: skip
        config = uvicorn.Config(
            Guard(app, address), log_level="critical", timeout_graceful_shutdown=0, access_log=False
        )
        print(f"the playground is at {address.url} (Ctrl-C ends it)", flush=True)
        if opens_browser:
            webbrowser.open(address.url)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which removes the folder
        uvicorn.Server(config).run([address.socket])


def _settle_gradio(uploads: str) -> None:
    """Set what Gradio reads from the environment when it is imported, whatever the user's says."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "HF_HUB_DISABLE_TELEMETRY": "1"}
