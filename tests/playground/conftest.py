"""The page as a visitor sees it: served by the real command, in a real browser."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT

from playground.small_models import all_models

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SECONDS = 60  # in which what a test waits for must happen, on a busy machine
_CHROMIUM = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
_NAMES = ("chromium", "chromium-browser", "google-chrome")

# What Gradio's own program says in the page that a reload leaves while a text streams.
_BROKEN_OFF = ("BodyStreamBuffer was aborted", "Connection errored out")

Visit = Callable[..., "Page"]


@contextlib.contextmanager
def served(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address and the process that serves it; it is interrupted at the end."""
    words = [sys.executable, "scripts/playground.py", "--port", "0", *map(str, arguments)]
    with subprocess.Popen(
        words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        try:
            line = process.stdout.readline()
            found = re.search(r"http://\S+/", line)
            assert found, line + process.stderr.read()
            yield found[0], process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(SECONDS)
            said = process.stderr.read()
    assert (process.returncode, said) == (130, "")  # as after any Ctrl-C, whatever the visitors did


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return all_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def address(models: list[Path]) -> Iterator[str]:
    """Where the page of `models` is."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs Gradio: pip install -e '.[playground]'")
    with served("--model", *models, "--device", "cpu") as (url, _):
        yield url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    flags = [*_CHROMIUM.split(), "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=program, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Visit]:
    """A function that opens the page as another visitor, with what Playwright's `new_context` takes. At the end it is an
    error if a visitor's browser asked for something elsewhere, or its console showed an error."""
    visitors, mistakes = [], []

    def open_page(**options: object) -> Page:
        visitor = browser.new_context(**options)
        visitors.append(visitor)
        page = visitor.new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.on("console", lambda said: mistakes.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.on(
            "request",
            lambda asked: mistakes.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None,
        )
        page.under_way = set()  # requests
        page.on("request", lambda asked: "/heartbeat/" in asked.url or page.under_way.add(asked))
        for end in ("requestfinished", "requestfailed"):
            page.on(end, lambda asked: page.under_way.discard(asked))
        page.goto(address)
        return page

    yield open_page
    for visitor in visitors:
        visitor.close()
    assert [mistake for mistake in mistakes if not any(words in mistake for words in _BROKEN_OFF)] == []


def choose(page: Page, name: str, label: str = "Model") -> None:
    """Choose a model, as one does with the mouse, and wait until the page has asked all that this makes it ask: Gradio loses
    what is asked in the moment in which an earlier answer ends."""
    page.get_by_label(label).click()
    page.get_by_role("option", name=name, exact=True).click()
    calm = 0
    while calm < 5:
        page.wait_for_timeout(100)
        calm = 0 if page.under_way else calm + 1


def set_number(page: Page, label: str, value: float) -> None:
    """Fill in a slider's number until Gradio keeps it: while it is still making the page, it takes it back."""
    number = page.get_by_label(f"number input for {label}")
    while number.input_value() != str(value):
        number.fill(str(value))
        page.wait_for_timeout(300)


def notes(page: Page) -> str:
    """Wait for a note of the page, and return its text."""
    note = page.locator(".toast-body").first
    note.wait_for()
    return note.inner_text()
