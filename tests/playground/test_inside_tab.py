"""Look inside and Runs in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.evals.inside import look_inside
from gpt2xla.runtime.one_device import OneDevice
from playground.conftest import Visit, choose, notes, set_number

if TYPE_CHECKING:
    from playwright.sync_api import Page

HOSTILE = "<script>document.title='bad'</script> <b>x"


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def look_inside_of(page: Page, text: str) -> None:
    page.locator("#text textarea").fill(text)
    page.get_by_role("button", name="Look inside").click()


def probabilities(page: Page) -> list[float]:
    """The points of the first curve, from 0 to 1."""
    path = page.locator("#seen path.line").first.get_attribute("d") or ""
    return [1 - float(y) / 300 for _, y in re.findall(r"[ML](\S+?) ([\d.]+)", path)]


def test_two_checkpoints_side_by_side(visit: Visit, models: list[Path]) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    open_tab(page, "Look inside")
    choose(page, "run/step-00000010", label="Compare with")
    look_inside_of(page, HOSTILE)
    page.locator("#seen section").nth(1).wait_for()
    assert page.locator("#seen h3").all_inner_texts() == ["run@latest", "run/step-00000010"]
    assert page.locator("#seen .written").first.inner_text() == HOSTILE + "▸"
    assert "bad" not in page.title()
    page.locator("#seen .token").nth(8).hover()
    tip = page.evaluate("getComputedStyle(document.querySelectorAll('#seen .token')[8], '::after').content")
    assert "“d”" in tip
    assert tip.count("%") in (10, 11)
    # Both show head 2 of layer 2 after these clicks, and a cell says its number.
    set_number(page, "Attention in layer", 2)
    page.get_by_text("layer 2 of 2, head 1").nth(1).wait_for()
    page.locator("#attention .head").nth(1).click()
    assert page.get_by_text("layer 2 of 2, head 2").count() == 2
    source = models[0] / "step-00000010"
    expected = look_inside(
        build_model(*load_weights(source), source), [*HOSTILE.encode()], OneDevice(torch.device("cpu"))
    )
    picture = page.locator("#attention .heat img").nth(1)
    box = picture.bounding_box()
    cell = box["width"] / len(HOSTILE)
    picture.hover(position={"x": 3.5 * cell, "y": 9.5 * cell})
    told = page.locator("#attention output").nth(1).inner_text()
    assert told == f"“o” (10) looks at “r” (4): {expected.attention[1, 1, 9, 3]:.0%}"


def test_repetition_climbs_to_certainty_where_a_model_continues_its_text(visit: Visit) -> None:
    page = visit(color_scheme="dark")
    choose(page, "copier")
    open_tab(page, "Look inside")
    page.set_viewport_size({"width": 390, "height": 800})
    set_number(page, "New tokens", 20)
    page.locator("#text textarea").fill("repat repa")
    page.get_by_role("button", name="Continue").click()
    page.locator("#attention .heat").wait_for()
    assert page.locator("#text textarea").input_value() == "repat repa" + "t repa" * 3 + "t "
    curve = probabilities(page)
    assert len(curve) == 29
    assert max(curve[:6]) < 0.05
    assert min(curve[6:]) > 0.99
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "the page is as wide as the screen"
    look_inside_of(page, "")
    assert "the text is empty" in notes(page)


def test_curves_of_a_run_grow_while_it_trains(visit: Visit, models: list[Path]) -> None:
    page = visit()
    open_tab(page, "Runs")
    page.get_by_text("run: step 20, ").wait_for()
    assert page.locator("#curves figure").count() == 2
    metrics = models[0] / "metrics.jsonl"
    before = metrics.read_text()
    try:
        metrics.write_text(before + json.dumps({"step": 21, "tokens": 21 * 512, "loss": 2.5, "lr": 1e-3}) + "\n")
        page.get_by_text("run: step 21, ").wait_for()
    finally:
        metrics.write_text(before)
