"""The page in a browser: loading it, writing, chatting, several visitors, and what it must not give away."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playground.conftest import Visit, choose, notes

if TYPE_CHECKING:
    from playwright.sync_api import Page

VISITORS = 8


def write(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Write", exact=True).click()


def set_new_tokens(page: Page, count: int) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for New tokens").fill(str(count))


def test_the_page_loads_fast_and_asks_for_nothing_elsewhere(visit: Visit) -> None:
    visit().get_by_role("button", name="Write", exact=True).wait_for()  # warms the server
    page = visit()
    page.get_by_role("button", name="Write", exact=True).wait_for()
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert painted < 1000, f"{painted:.0f} ms"
    shown = [tab.inner_text() for tab in page.get_by_role("tab").all()]
    assert shown == ["Write", "Chat", "Draw", "Recognise", "Look inside", "Runs"]


def test_a_text_streams_and_stops(visit: Visit) -> None:
    page = visit()
    set_new_tokens(page, 1000)
    write(page, "<b>{{7*7}} ${1+1}")
    tokens = page.locator(".token")
    tokens.nth(5).wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.token').length == window.before || ((window.before = document.querySelectorAll('.token').length), false)", polling=500)
    assert 5 < tokens.count() < 1000
    assert page.locator(".written .prompt").inner_text() == "<b>{{7*7}} ${1+1}"
    page.reload()
    write(page, "again")
    tokens.nth(5).wait_for()
