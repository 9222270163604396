"""`recognise.py`: the words of drawings against Hugging Face's model, and what it refuses."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here, succeed
from evals.small import make_model
from PIL import Image, ImageDraw
from transformers import GPT2LMHeadModel

from gpt2xla.commands.recognise import bars
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.evals.recognition import Guess
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.picture_file import picture_of
from gpt2xla.sketches.tokenizer import train_tokenizer

WORDS = ["apple", "alarm clock", "cat", "house", "star", "sun", "tree"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of sketches by a pen of two pixels, with weights by chance."""
    format = SketchFormat.fitted(train_tokenizer(dict.fromkeys(WORDS, 1), 24, 1024), 24, WORDS, stroke_width=2)
    return make_model(tmp_path_factory.mktemp("model") / "m", seq_length=96, tokenizer=format.tokenizer)


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    """A house, as an image."""
    image = Image.new("L", (200, 200), 255)
    ImageDraw.Draw(image).line([(30, 180), (30, 90), (100, 20), (170, 90), (170, 180), (30, 180)], fill=0, width=6)
    image.save(tmp_path / "house.png")
    return tmp_path / "house.png"


def by_transformers(model: Path, picture: np.ndarray, words: list[str]) -> dict[str, float]:
    """The probability of each word after a picture, among `words`; here each word is one token."""
    tokenizer = load_tokenizer(str(model)).reading_special_tokens()
    rows = "\n".join("".join("01"[pixel] for pixel in row) for row in picture.astype(int).tolist())
    ids = [tokenizer.eot_id, *tokenizer.encode(f"<MSGSTART> <IMGSTART>\n{rows}\n<IMGEND>")]
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained(model, dtype=torch.float64)(torch.tensor([ids])).logits[0, -1]
    found = logits[[tokenizer.encode(word)[0] for word in words]].softmax(-1).tolist()
    return dict(zip(words, found, strict=True))


def recognised(*arguments: object) -> list[dict]:
    return [json.loads(line) for line in succeed(run_here("scripts/recognise.py", "--json", *arguments)).splitlines()]


def test_the_picture_and_its_likeliest_words_are_printed(model: Path, drawing: Path) -> None:
    picture = picture_of(drawing.read_bytes(), "x", 24, stroke_width=2)
    expected = by_transformers(model, picture, WORDS)
    lines = succeed(run_here("scripts/recognise.py", drawing, "--model", model, "--device", "cpu")).splitlines()
    assert len(lines) == 12 + 5
    shown = np.zeros((24, 24), bool)
    for number, line in enumerate(lines[:12]):
        for column, character in enumerate(line):
            shown[2 * number : 2 * number + 2, column] = [character in "▀█", character in "▄█"]
    assert np.array_equal(shown, picture)
    order = sorted(WORDS, key=lambda word: -expected[word])[:5]
    for word, line in zip(order, lines[12:], strict=True):
        name, percent, bar = re.fullmatch(r"([a-z ]+?) +([\d.]+)% ([▏▎▍▌▋▊▉█]+)", line).groups()
        assert name == word
        assert float(percent) == pytest.approx(100 * expected[word], abs=0.06)
        eighths = 8 * bar.count("█") + sum(" ▏▎▍▌▋▊▉".find(character) for character in bar.strip("█"))
        assert eighths == pytest.approx(240 * expected[word], abs=0.6)


def test_several_drawings_as_json_lines_and_some_of_the_words(
    model: Path, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\r\n".join("01" * 12 for _ in range(24))
    (tmp_path / "stripes.txt").write_text(text)
    files = [drawing, tmp_path / "stripes.txt"]
    for words in (WORDS, ["sun", "cat"]):
        found = recognised(
            *files, "--model", model, "--top", 99, *([] if words == WORDS else ["--words", *words, "sun"])
        )
        for file, line in zip(files, found, strict=True):
            assert line["file"] == str(file)
            expected = by_transformers(model, picture_of(file.read_bytes(), "x", 24, stroke_width=2), words)
            assert {entry["word"]: entry["probability"] for entry in line["words"]} == pytest.approx(expected, rel=1e-4)
            assert sum(entry["probability"] for entry in line["words"]) == pytest.approx(1)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    (line,) = recognised("-", "--model", model)
    assert line["words"] == recognised(files[1], "--model", model)[0]["words"]
    named = succeed(run_here("scripts/recognise.py", *files, "--model", model, "--top", 1)).splitlines()
    assert [line for line in named if line.startswith(str(tmp_path))] == [str(file) for file in files]


def test_a_terminal_without_block_characters_gets_other_bars() -> None:
    guesses = [Guess("alarm clock", 0.75), Guess("sun", 0.0001)]
    assert bars(guesses, has_blocks=False) == [f"alarm clock  75.0% {'#' * 22}", "sun           0.0%"]
    assert bars(guesses, has_blocks=True) == [f"alarm clock  75.0% {'█' * 22}▌", "sun           0.0%"]


def test_wrong_input_is_one_line(model: Path, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is printed of the good drawing that stands before the wrong one."""
    plain = make_model(tmp_path / "plain", seq_length=96)
    short = make_model(tmp_path / "short", seq_length=64, tokenizer=load_tokenizer(str(model)))
    (tmp_path / "23.txt").write_text("\n".join(["01" * 12] * 23))
    (tmp_path / "cut.png").write_bytes(drawing.read_bytes()[:200])
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    Image.new("L", (50, 50)).save(tmp_path / "blank.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    wrong = {
        (drawing, tmp_path / "none.png", "--model", model): f"FILE {tmp_path}/none.png: no such file; correct the path",
        (drawing, tmp_path, "--model", model): f"{tmp_path}: Is a directory; fix it, or choose another",
        (drawing, tmp_path / "23.txt", "--model", model): f"{tmp_path}/23.txt: 23 rows of 0 and 1; give 24 rows of 24",
        (drawing, tmp_path / "cut.png", "--model", model): f"{tmp_path}/cut.png: the image is damaged or cut short (",
        (tmp_path / "dot.png", "--model", model): f"{tmp_path}/dot.png: 1 x 1 pixels are too few for a drawing",
        (tmp_path / "blank.png", "--model", model): f"{tmp_path}/blank.png is blank: nothing in it differs from",
        ("-", "--model", model): "standard input is empty; give a PNG, JPEG, WebP, GIF or BMP image, or a text of 0",
        ("-", "-", "--model", model): "FILE - is there twice, and standard input holds one drawing; leave one out",
        (drawing, "--model", plain): f"--model {plain} was not trained on sketches; train one on what scripts/prepare",
        (drawing, "--model", short): "a drawing and its word are",
        (drawing, "--model", tmp_path / "none"): f"--model {tmp_path}/none: no such folder or file",
        (drawing, "--model", model, "--words", "cat", "aple"): "--words 'aple': the model has not learned this word",
        (drawing, "--model", model, "--words", "qqq"): "--words 'qqq': the model has not learned this word; name some",
        (drawing, "--model", model, "--words", "cat"): "--words 'cat' leaves no choice; name two words or more",
        (drawing, "--model", model, "--top", 0): "--top 0: choose a number of at least 1",
        (drawing, "--model", model, "--device", "abacus"): "--device 'abacus': choose auto, cpu, cuda, mps or xla",
        (drawing,): "add --model: it has no default",
        ("--model", model): "add FILE: it has no default",
    }
    for arguments, reason in wrong.items():
        result = run_here("scripts/recognise.py", *arguments)
        assert (result.returncode, result.stdout) == (2, ""), (arguments, result.stderr)
        assert result.stderr.startswith(f"recognise.py: error: {reason}"), result.stderr
        assert len(result.stderr.splitlines()) == 1
