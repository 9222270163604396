"""Which word a drawing shows, against a plain loop over Hugging Face's model in float64 that reads sketches as text."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from evals.sketch_data import WORDS, format_of, make_data, pictures, reference
from evals.small import make_model

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import TorchConfig, TrainConfig
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.windows import Windows
from gpt2xla.errors import InputError
from gpt2xla.evals.multiple_choice import MultipleChoice
from gpt2xla.evals.recognition import (
    Recogniser,
    likeliest,
    naming_rows,
    read_sketches,
    recognition,
    word_log_probabilities,
)
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.torch.runtime import TorchRuntime
from gpt2xla.sketches.format import SketchFormat


@pytest.fixture(scope="module", params=["pieces", "bytes"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SketchFormat, GPT2]:
    """A model with words of one token, and one with words of several."""
    format = format_of(request.param)
    folder = make_model(tmp_path_factory.mktemp("models") / "m", seq_length=96, tokenizer=format.tokenizer)
    config, weights = load_weights(folder)
    return folder, format, build_model(config, weights, folder)


def windows_of(folder: Path, length: int) -> Windows:
    return Windows(TokenStream(folder / "test", "--valid-dir"), length, 10**6)


def test_one_picture_at_a_time_and_many_in_batches_equal_transformers(asked: tuple[Path, SketchFormat, GPT2]) -> None:
    """In batches that do not divide the pictures, and with more rows of the cache than a word has beginnings."""
    folder, format, model = asked
    drawn = [picture for picture, _ in pictures(4, format.size)]
    expected = reference(folder, drawn)
    for rows in (0, 3, 40):
        found = word_log_probabilities(model, format, drawn, rows=rows, width=9)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    runtime.setup_model(model)
    rows = naming_rows(format, drawn, 96)
    assert len(rows.tokens) == len(drawn) * (1 if format.has_single_tokens else len(WORDS)), "as few reads as possible"
    choice = MultipleChoice("sketch recognition", rows, model, runtime, 3)
    np.testing.assert_allclose(choice.run(), expected, rtol=1e-5, atol=1e-4)


def test_the_likeliest_words_come_first_with_their_share_of_the_words(asked: tuple[Path, SketchFormat, GPT2]) -> None:
    folder, format, model = asked
    ((picture, _),) = pictures(1, format.size)
    (expected,) = np.exp(reference(folder, [picture]))
    guesses = likeliest(model, format, picture, 3)
    order = sorted(range(len(WORDS)), key=lambda i: -expected[i])
    assert [guess.word for guess in guesses] == [WORDS[i] for i in order[:3]]
    shares = [expected[i] / expected.sum() for i in order[:3]]
    assert [guess.probability for guess in guesses] == pytest.approx(shares, rel=1e-3)
    assert len(likeliest(model, format, picture, 99)) == len(WORDS)


def test_recognition_counts_the_right_words(asked: tuple[Path, SketchFormat, GPT2], tmp_path: Path) -> None:
    """Of the drawings of a split, each once, whatever their order."""
    folder, format, model = asked
    windows = windows_of(make_data(tmp_path, format, 96, count=14), 96)
    held_out = read_sketches(windows, format, 99)
    written = pictures(14, format.size, seed=1)
    assert sorted((p.tobytes(), w) for p, w in held_out) == sorted((p.tobytes(), w) for p, w in written)
    assert [w for _, w in read_sketches(windows, format, 7)] == [w for _, w in held_out[:7]], "the same ones each time"
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    runtime.setup_model(model)
    found = Recogniser(format, windows, model, runtime, 4).run()
    right = {1: 0, 5: 0}
    for row, (_, word) in zip(reference(folder, [picture for picture, _ in written]), written, strict=True):
        for count in right:
            right[count] += word in sorted(WORDS, key=lambda w: -row[WORDS.index(w)])[:count]
    assert found.line() == {"sketch_top1": right[1] / 14, "sketch_top5": right[5] / 14, "sketch_drawings": 14}


def test_equally_likely_words_are_not_all_recognised() -> None:
    found = recognition(np.zeros((7, 7)), np.arange(7))
    assert (found.top1, found.top5) == (pytest.approx(1 / 7), pytest.approx(5 / 7))


def test_words_of_several_tokens_mean_fewer_drawings(
    asked: tuple[Path, SketchFormat, GPT2], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, format, model = asked
    windows = windows_of(make_data(tmp_path, format, 96, count=14), 96)
    monkeypatch.setattr("gpt2xla.evals.recognition._MOST_ROWS", 16)
    recogniser = Recogniser(format, windows, model, TorchRuntime(TorchConfig(), TrainConfig()), 4)
    assert len(recogniser.labels) == (14 if format.has_single_tokens else 2)


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    format = format_of("pieces")
    picture = pictures(1, 12)[0][0]
    model = GPT2(load_weights(make_model(tmp_path / "m", seq_length=28, tokenizer=format.tokenizer))[0])
    assert word_log_probabilities(model, format, [picture]).shape == (1, len(WORDS)), (
        "29 tokens, the last one predicted"
    )
    with pytest.raises(
        InputError, match="a drawing and its word are 29 tokens, and a model of --seq-length 27 predicts"
    ):
        naming_rows(format, [picture], 27)
    windows = windows_of(make_data(tmp_path / "data", format, 96, count=4), 96)
    others = SketchFormat(format.tokenizer, 12, ["zebra"])
    with pytest.raises(InputError, match=r"--valid-dir .*test holds no whole sketch of the words of its tokenizer"):
        read_sketches(windows, others, 9)
    with pytest.raises(InputError, match=r"row \d: these ids are not .*; prepare it again"):
        read_sketches(windows, SketchFormat(format.tokenizer, 11, WORDS), 9)


@pytest.mark.slow
def test_on_xla_recognition_needs_no_program_beside_those_of_drawing() -> None:
    result = run("tests/workers/recognition_worker.py", PJRT_DEVICE="CPU", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for kind in ("pieces", "bytes"):
        np.testing.assert_allclose(found[kind]["xla"], found[kind]["torch"], rtol=1e-4, atol=1e-4)
        assert found[kind]["compiles"][0] == found[kind]["compiles"][1]
    assert not re.search("compiled again", result.stderr)
