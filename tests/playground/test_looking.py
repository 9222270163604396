"""What Look inside shows of its numbers: tokens, candidates, curves and attention, however hostile the text."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from playground import small_models

pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[playground]'")

from gpt2xla.playground.chart import Axis, Hint, Series, line_chart, ticks
from gpt2xla.playground.heat_maps import heat_maps
from gpt2xla.playground.looking import Look, look, side_by_side
from gpt2xla.playground.models import Models

HOSTILE = "<script>alert(1)</script> \"'&amp; héllo 🙂\n\tx ${1+1} {{2}}"
NAME = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text inside each element of a class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, of_class: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if of_class in (attributes.get("class") or "").split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.run(tmp_path_factory.mktemp("models") / "run")


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return Models([str(folder)], None, "cpu", "auto")


def look_at(models: Models, name: str, text: str) -> Look:
    with models.opened(name) as opened:
        tokenizer = opened.tokenizer.reading_special_tokens()
        return look(opened, tokenizer.encode(text), tokenizer)


@pytest.fixture(scope="module")
def hostile(models: Models) -> Look:
    return look_at(models, "run@latest", HOSTILE)


def test_each_token_has_its_text_and_what_was_likely_in_its_place(models: Models, hostile: Look) -> None:
    assert "".join(hostile.pieces) == HOSTILE
    place = HOSTILE.encode().index("🙂".encode())
    assert hostile.pieces[place : place + 4] == ["", "", "", "🙂"], "a character is its last byte's"
    with models.opened("run@latest") as opened, torch.no_grad():
        logits = opened.model.logits(torch.tensor([hostile.ids]))[0].double()
    probabilities = logits.softmax(-1).numpy()
    assert len(hostile.choices) == len(hostile.ids) + 1
    for place in range(1, len(hostile.ids) + 1):
        choices = hostile.choices[place]
        if place < len(hostile.ids):
            assert choices[0].token == hostile.ids[place]
        assert len({choice.token for choice in choices}) == len(choices) >= 10
        for choice in choices:
            assert choice.probability == pytest.approx(probabilities[place - 1, choice.token], rel=1e-4)


def test_no_token_and_no_name_becomes_a_part_of_the_page(models: Models, hostile: Look) -> None:
    looks = [hostile._replace(name=NAME), look_at(models, "run@latest", HOSTILE + "\n")]
    page = Page(side_by_side(looks) + heat_maps(looks, 1))
    known = "div section h3 span p b i figure figcaption svg path rect title button img output"
    assert {tag for tag, _ in page.tags} <= set(known.split())
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert NAME in page.text
    assert len(page.all("token")) == 2 * len(hostile.ids) + 3
    assert "“>”" in (page.all("token")[7]["data-tip"] or "")
    assert len(page.all("chart")) == 2, "the tokens differ"
    assert len(Page(side_by_side([hostile, hostile])).all("chart")) == 1


def test_the_picture_of_a_head_is_its_weights(hostile: Look) -> None:
    pictures = [attributes["src"] for tag, attributes in Page(heat_maps([hostile], 2)).tags if tag == "img"]
    assert len(pictures) == 2 + 1, "both heads of layer 2, and one of them large"
    assert Page(heat_maps([hostile], 7)).text == Page(heat_maps([hostile], 2)).text, "it has no third layer"
    for head, picture in enumerate(pictures[:2]):
        image = Image.open(io.BytesIO(base64.b64decode((picture or "").partition(",")[2])))
        shown = np.asarray(image.convert("RGBA"))[..., 3]
        assert (shown == hostile.attention[1, head]).all()
        assert abs(shown.sum(1) / 255 - 1).max() < 0.1, "but for rounding"


def test_documents_are_read_apart_if_the_model_was_trained_so(models: Models, folder: Path, tmp_path: Path) -> None:
    text = "ab<|endoftext|>cd"
    across = look_at(models, "run@latest", text)
    assert (across.attention[:, :, 3, :2] > 0).any()
    assert across.notes == []
    checkpoint = shutil.copytree(folder / "step-00000020", tmp_path / "masked")
    (checkpoint / "run_config.json").write_text(json.dumps({"document_mask": True}))
    apart = look_at(Models([str(checkpoint)], None, "cpu", "auto"), "masked", text)
    assert (apart.attention[:, :, 2:, :2] == 0).all()
    assert "end-of-text" in apart.notes[0]


def test_a_text_longer_than_the_model_is_shown_as_far_as_it_reads(models: Models) -> None:
    long = look_at(models, "run@latest", "x" * 300)
    assert len(long.ids) == small_models.SEQ_LENGTH == 256
    assert long.notes == ["The text has 300 tokens; the first 256 are shown."]
    assert long.attention.shape == (2, 2, 128, 128)
    assert "The first 128 tokens are shown." in heat_maps([long], 1)
    alone = look_at(models, "run@latest", "x")
    assert "chart" not in side_by_side([alone]), "nothing predicts the first token"


def points(path: str) -> Iterator[tuple[float, float]]:
    for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path):
        yield float(x) / 1000, 1 - float(y) / 300


def test_a_chart_draws_what_it_is_given() -> None:
    x, y = [0.0, 1, 2, 3, 4], [1.0, 2, np.nan, 3, 5]
    chart = line_chart(
        "<b>", [Series("a & b", 0, x, y), Series("", 8, x, y, "dots")], Axis(0, 4, [(2, "<2>")]), Axis(1, 5, [(3, "three")]),
        [Hint(1, 2, "<i>")],
    )  # fmt: skip
    page = Page(chart)
    assert [page.text.count(text) for text in ("<b>", "a & b", "<2>", "three", "<i>")] == [1] * 5
    line, dots = (one["d"] for kind in ("line", "dots") for one in page.all(kind) if "d" in one)
    expected = [(0, 0), (0.25, 0.25), (0.75, 0.5), (1, 1)]
    assert list(points(line or "")) == list(points(dots or "")) == expected
    assert re.sub(r"[^ML]", "", line or "") == "MLML", "no line goes over a gap"
    assert page.all("color-2"), "colors come again"


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (2.9, 10.8, [4, 6, 8, 10]),
        (0, 128, [0, 50, 100]),
        (3.21, 3.24, [3.21, 3.22, 3.23, 3.24]),
        (5, 5, [5]),
        (0, float("nan"), [0]),
    ],
)
def test_ticks_are_round_numbers(start: float, end: float, expected: list[float]) -> None:
    assert ticks(start, end) == pytest.approx(expected)
