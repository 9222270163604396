"""Drawing: pictures that are always well-formed, and generate.py --draw."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here, succeed
from sketch_model import WORDS, sketch_format, untrained
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.errors import InputError
from gpt2xla.generation.block_characters import characters_for, lines_of
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.drawing import draw, draw_rows
from gpt2xla.generation.sampling import GREEDY, USUAL, SamplingConfig
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.sketches.format import SketchFormat

WILD = SamplingConfig(temperature=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model for sketches of 11 pixels, as a checkpoint is."""
    folder, format = tmp_path_factory.mktemp("sketches"), sketch_format(11)
    model = untrained(format, 64)
    hf.save_model(folder, model.config, model.state_dict(), GenerationSettings.of(format.tokenizer))
    hf.save_tokenizer(folder, format.tokenizer, 64)
    return folder


def model_of(folder: Path) -> tuple[GPT2, SketchFormat]:
    format = SketchFormat.of(load_tokenizer(str(folder)))
    return untrained(format, 64), format


def test_a_hundred_pictures_of_a_model_that_learned_nothing_are_all_well_formed() -> None:
    for format, count in ((sketch_format(24), 100), (SketchFormat.fitted(load_tokenizer("bytes"), 5, ["cat"]), 20)):
        model = untrained(format, 96)
        words = [WORDS[number % 3] for number in range(count - 1)] + ["never seen"]
        pictures = draw(model, format, words, WILD, range(count))
        assert [picture.shape for picture in pictures] == [(format.size, format.size)] * count
        assert all(picture.dtype == bool for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == count


def test_pictures_grow_row_by_row_and_do_not_depend_on_those_beside_them() -> None:
    format = sketch_format(11)
    model = untrained(format, 64)
    steps = list(draw_rows(model, format, ["cat", "apple"], USUAL, [5, 6]))
    assert [[len(picture) for picture in step] for step in steps] == [[n, n] for n in range(1, 12)]
    for step in steps:
        assert all((now == last[: len(now)]).all() for now, last in zip(step, steps[-1], strict=True))
    [alone] = draw(model, format, ["apple"], USUAL, [6])
    assert (alone == steps[-1][1]).all()


def test_transformers_draws_the_same_picture_from_the_folder_as_it_is(folder: Path) -> None:
    """With its own form of constrained decoding, and the ids of each place in a row written out."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("<|endoftext|><MSGSTART> cat <IMGSTART>", return_tensors="pt")
    begun = prompt["input_ids"].shape[1]
    pieces = [[f"{number:0{width}b}" for number in range(2**width)] for width in (8, 3)]
    ids = [tokenizer.convert_tokens_to_ids(texts) for texts in pieces]

    def allowed(row: int, so_far: torch.Tensor) -> list[int]:
        return ids[(len(so_far) - begun) % 2]

    out = model.generate(**prompt, max_new_tokens=22, do_sample=False, prefix_allowed_tokens_fn=allowed)
    text = tokenizer.decode(out[0, begun:])
    theirs = np.array([list(text[start : start + 11]) for start in range(0, 121, 11)]) == "1"
    ours, format = model_of(folder)
    [picture] = draw(ours, format, ["cat"], GREEDY, [0])
    assert (picture == theirs).all()
    assert 0 < picture.mean() < 1


def test_a_model_too_small_for_a_picture_is_refused() -> None:
    format = sketch_format(11)
    model = untrained(format, 64)
    with pytest.raises(InputError, match="to draw 'cat' takes 25 tokens, and the model reads only 24"):
        draw(untrained(format, 24), format, ["cat"], USUAL, [0])
    exact = draw(untrained(format, 25), format, ["cat"], USUAL, [0])
    assert exact[0].shape == (11, 11)
    smaller = GPT2(dataclasses.replace(model.config, vocab_size=400))
    with pytest.raises(InputError, match="ids, and the model has only 400"):
        draw(smaller, format, ["cat"], USUAL, [0])


def test_without_a_mask_all_ids_may_be_drawn() -> None:
    format = sketch_format(8)
    model = untrained(format, 64)
    plain = list(generate(model, [[1, 2]], 10))
    seen: list[tuple[int, list[int]]] = []

    def allowed(row: int, new_ids):
        seen.append((row, list(new_ids)))

    assert list(generate(model, [[1, 2]], 10, allowed=allowed)) == plain
    assert seen == [(0, [token for (token,) in plain[:count]]) for count in range(10)]


def pixels(lines: list[str], size: int) -> np.ndarray:
    """What lines of block characters show."""
    rows = [[character in marks for character in line.ljust(size)] for line in lines for marks in ("▀█", "▄█")]
    return np.array(rows)[:size]


def test_a_word_is_drawn_in_the_terminal_as_many_samples_side_by_side_as_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # three of 11 columns with two between
    flags = ["--model", folder, "--draw", "cat", "--seed", 7]
    result = run_here("generate.py", *flags, "--num-samples", 4)
    lines = succeed(result).split("\n")
    assert result.stderr == ""
    assert lines[6] == ""
    assert len(lines) == 14
    model, format = model_of(folder)
    expected = draw(model, format, ["cat"] * 4, USUAL, range(7, 11))
    for number in range(3):
        shown = [line[13 * number : 13 * number + 11] for line in lines[:6]]
        assert (pixels(shown, 11) == expected[number]).all()
    assert (pixels(lines[7:13], 11) == expected[3]).all()
    assert succeed(run_here("generate.py", *flags)).split("\n")[:-1] == [line[:11].rstrip() for line in lines[:6]]


def test_without_a_seed_it_is_printed_and_an_unseen_word_is_drawn_with_a_note(folder: Path) -> None:
    result = run_here("generate.py", "--model", folder, "--draw", "unicorn", "--top-k", 2)
    assert len(succeed(result).split("\n")) == 7
    note, seed = result.stderr.splitlines()
    assert note == "note: 'unicorn' is none of the 3 words that the model learned"
    assert seed.endswith("to get this drawing again")


def test_where_there_are_no_block_characters_ascii_shows_the_picture() -> None:
    picture = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
    for encoding, shown in (("ascii", [" .':", "'  '"]), ("latin-1", [" .':", "'  '"]), ("utf-8", [" ▄▀█", "▀  ▀"])):
        characters = characters_for(io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        grown = [[picture[:rows]] for rows in range(1, 4)]
        assert list(lines_of(grown, 3, characters)) == shown
        assert list(lines_of(grown[:2], 3, characters)) == shown[:1]


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [(["--draw", "cat", "--prompt", "x"], "--draw and --prompt exclude each other; leave one out"),
     (["--draw", "cat", "--chat"], "--draw and --chat exclude"),
     (["--draw", "cat", "--prompts-file", "x.txt"], "--draw and --prompts-file exclude"),
     (["--draw", "cat", "--stop", "x"], "--draw and --stop exclude"),
     (["--draw", "cat", "--max-new-tokens", "9"], "--draw and --max-new-tokens exclude"),
     (["--draw", ""], "--draw is empty"),
     (["--draw", " cat"], "--draw ' cat' has blanks around it"),
     (["--draw", "a<IMGEND>b"], "--draw 'a<IMGEND>b' spells the special token <IMGEND>"),
     (["--draw", "cat", "--num-samples", "0"], "--num-samples"),
     (["--draw", "cat", "--tokenizer", "bytes"], "was not trained on sketches")],
)  # fmt: skip
def test_wrong_drawing_input_is_one_line(folder: Path, flags: list[str], culprit: str) -> None:
    result = run_here("generate.py", "--model", folder, *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert culprit in result.stderr
    assert result.stderr.count("\n") == 1
