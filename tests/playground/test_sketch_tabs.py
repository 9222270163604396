"""Draw and Recognise in a browser: pictures grow and stop, and what a visitor draws is what the model was trained on."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.evals.recognition import likeliest
from gpt2xla.generation.drawing import draw
from gpt2xla.generation.sampling import USUAL
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.playground.choices import percent
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.picture_file import picture_of
from gpt2xla.sketches.strokes import rasterise
from playground.conftest import Visit, choose, set_number

if TYPE_CHECKING:
    from playwright.sync_api import Page, Request

CIRCLE = [(0.5 + 0.3 * math.cos(t), 0.55 + 0.3 * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 25)]
NOT_YET_DRAWN = 2
STALK = [(0.5, 0.25), (0.55, 0.1)]
# Keeps what the first picture is after each change, and calls `onDrawn`.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const first = document.querySelector('#drawn img');
  if (first && first.src !== seen.at(-1)) seen.push(first.src);
  window.onDrawn?.();
}).observe(document.querySelector('#drawn'), {subtree: true, childList: true, attributes: true});
"""
STOP_AT_THE_FIRST_ROW = """
window.onDrawn = () => {
  if (seen.length < 2) return;
  window.onDrawn = null;
  [...document.querySelectorAll('button')].find(b => b.checkVisibility() && b.textContent.trim() === 'Stop').click();
};
"""
PASTE = """text => {
  const clipboardData = new DataTransfer();
  clipboardData.setData('text/plain', text);
  document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def sketcher(models: list[Path]) -> tuple[GPT2, SketchFormat]:
    """The model that the page calls "sketcher"."""
    folder = next(folder for folder in models if folder.name == "sketcher")
    sketches = SketchFormat.of(load_tokenizer(str(folder)))
    assert sketches is not None
    return build_model(*load_weights(folder), folder), sketches


def pixels(source: str) -> np.ndarray:
    """The numbers of the colors of an image of the page: 0 is paper, 1 ink."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def draw_line(page: Page, points: list[tuple[float, float]]) -> None:
    """Draw with the mouse; `points` are shares of the canvas's sides."""
    box = page.locator("canvas").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for x, y in at[1:]:
        page.mouse.move(x, y)
    page.mouse.up()


def strokes_in(request: Request) -> list[list[list[int]]]:
    """The strokes that a request of the canvas sends; none if it is another request."""
    sent = request.post_data_json["data"][1] if "queue/join" in request.url else None
    return json.loads(sent or "[]")


def recognised(page: Page, note: str = "It looks like") -> tuple[np.ndarray, list[str]]:
    """What the page says that the model saw, and the words, once `note` is beside it."""
    page.locator("#recognised p", has_text=note).wait_for()
    shown = page.locator("#recognised .word").all_inner_texts()
    return pixels(page.locator("#recognised img").get_attribute("src")), [word for word in shown if word]


def wait_for_words(page: Page, expected: list[str]) -> None:
    page.wait_for_function(
        "words => [...document.querySelectorAll('#recognised li')].map(e => e.textContent).join() === words",
        arg=",".join([*expected, *[""] * (10 - len(expected))]),
    )


def test_the_words_change_while_one_draws(visit: Visit, sketcher: tuple[GPT2, SketchFormat]) -> None:
    model, sketches = sketcher

    def words(strokes: list) -> list[str]:
        guesses = likeliest(model, sketches, rasterise([np.array(s) for s in strokes]))
        return [f"{guess.word}{percent(guess.probability)}" for guess in guesses]

    page = visit()
    page.get_by_role("tab", name="Recognise").click()
    page.get_by_text("was not trained on sketches").last.wait_for()
    assert page.locator("canvas").count() == 0
    choose(page, "sketcher")
    page.locator("canvas").wait_for()
    height = page.locator("#recognised").bounding_box()["height"]

    with page.expect_request(lambda asked: [*map(len, strokes_in(asked))] == [25, 2]) as asked:
        draw_line(page, CIRCLE)
        draw_line(page, STALK)
    strokes = strokes_in(asked.value)
    for drawn, wanted in zip(strokes, (CIRCLE, STALK), strict=True):
        assert np.abs(np.array(drawn) - 1000 * np.array(wanted)).max() < 3  # a pixel of the screen
    wait_for_words(page, words(strokes))
    seen, _ = recognised(page)
    assert (seen == rasterise([np.array(stroke) for stroke in strokes])).all()
    assert page.locator("#recognised").bounding_box()["height"] == height

    choose(page, "run@latest")  # and back: the drawing is kept
    page.locator("canvas").wait_for(state="detached")
    choose(page, "sketcher")
    page.locator("canvas").wait_for()
    assert words(strokes[:1]) != words(strokes)
    page.get_by_role("button", name="Undo").click()
    wait_for_words(page, words(strokes[:1]))
    page.get_by_role("button", name="Clear").click()
    wait_for_words(page, [])


def test_images_and_texts_are_recognised_or_refused(visit: Visit, tmp_path: Path) -> None:
    page = visit(has_touch=True)
    page.get_by_role("tab", name="Recognise").click()
    choose(page, "sketcher")
    page.locator("canvas").tap(position={"x": 50, "y": 50})
    seen, _ = recognised(page)
    assert seen.sum() == 1

    image = Image.new("RGB", (200, 100), "navy")
    ImageDraw.Draw(image).ellipse((60, 20, 140, 80), outline="yellow", width=6)
    image.save(tmp_path / "ellipse.png")
    chooser = page.locator("#canvas input[type=file]")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    chooser.set_input_files(tmp_path / "dot.png")
    recognised(page, "This file: 1 x 1 pixels")
    chooser.set_input_files(tmp_path / "ellipse.png")
    seen, _ = recognised(page)
    assert (seen == picture_of((tmp_path / "ellipse.png").read_bytes(), "", 24)).all()

    diagonal = ["0" * i + "1" + "0" * (23 - i) for i in range(24)]
    page.evaluate(PASTE, "\n".join(diagonal[:23]))
    assert recognised(page, "This file: 23 rows of 0 and 1; give 24 rows of 24")[1] == []
    page.get_by_role("button", name="Paste 0 and 1").click()
    text = page.locator("#zeros-and-ones textarea")
    text.fill("\n".join(diagonal))
    seen, _ = recognised(page)
    assert (seen == np.eye(24)).all()
    text.fill("\n".join(diagonal[:23]))
    recognised(page, "This text: 23 rows of 0 and 1; give 24 rows of 24")


def test_pictures_grow_row_by_row_until_they_are_stopped(visit: Visit, sketcher: tuple[GPT2, SketchFormat]) -> None:
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    choose(page, "slow")
    start = page.get_by_role("button", name="Draw", exact=True)
    set_number(page, "Pictures", 16)
    page.evaluate(WATCH + STOP_AT_THE_FIRST_ROW)
    with page.expect_response("**/reset"):  # the last that Stop asks for
        start.click()

    choose(page, "sketcher")
    page.get_by_label("Word").fill("windmill")
    page.get_by_label("Word").press("Enter")
    set_number(page, "Pictures", 2)
    stopped = page.evaluate("seen.length")
    start.click()  # is done when the first has stopped
    note = page.locator("#drawn .note", has_text="2 pictures")
    note.wait_for()
    seen = [(pixels(source)[:, 0] != NOT_YET_DRAWN).sum() for source in page.evaluate("seen")]
    assert seen[0] == 0
    assert seen[:stopped] == sorted(seen[:stopped])
    assert seen[stopped - 1] < 24
    assert seen[stopped:] == sorted(seen[stopped:])
    assert len(seen) - stopped > 2
    assert seen[-1] == 24

    found = re.fullmatch(r"2 pictures\. Seed (\d+)\. The model did not learn this word", note.inner_text())
    expected = draw(*sketcher, ["windmill"] * 2, USUAL, [int(found[1]), int(found[1]) + 1])
    shown = [pixels(image.get_attribute("src")) for image in page.locator("#drawn img").all()]
    assert np.array_equal(shown, expected)
