"""Sketches as ids against the text of sketches, read by this project and by transformers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import write_split
from sketch_tokenizers import SIZES, WORDS, format_for, pictures, tokenizer_for
from tokenizers import normalizers
from transformers import AutoTokenizer

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.checkpoint.model_card import card_of_model, published
from gpt2xla.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from gpt2xla.data.batch_plan import BatchPlan
from gpt2xla.data.opening import TrainingData
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.errors import InputError
from gpt2xla.sketches.format import SketchFormat

UNSEEN = ["unseen thing", "日本 🙂", "11", "-"]


@pytest.fixture(params=["trained", "bytes", "rows"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_ids_are_those_of_the_text_here_and_in_transformers(kind: str, size: int, tmp_path: Path) -> None:
    check_ids(format_for(kind, size), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_so_they_are_for_gpt2s_tokenizer(gpt2_encoding: str, size: int, tmp_path: Path) -> None:
    check_ids(format_for(gpt2_encoding, size), tmp_path)


def check_ids(format: SketchFormat, tmp_path: Path) -> None:
    size = format.size
    hf.save_tokenizer(tmp_path, format.tokenizer, 1024)
    ours, theirs = load_tokenizer(str(tmp_path)).reading_special_tokens(), AutoTokenizer.from_pretrained(tmp_path)
    end_of_text = format.tokenizer.eot_id
    both = itertools.product([*WORDS, *UNSEEN], (True, False))
    for (word, word_before), picture in zip(both, pictures(2 * len(WORDS + UNSEEN), size), strict=True):
        ids = format.ids(word, picture, word_before).tolist()
        text = format.text(word, picture, word_before)
        assert ids == [end_of_text, *ours.encode(text)] == [end_of_text, *theirs(text)["input_ids"]]
        [(again, name)] = format.sketches(ids)
        assert (again == picture).all()
        assert name == word
        rows = "\n".join("".join("1" if pixel else "0" for pixel in row) for row in picture)
        before = f"{word} " if word_before else ""
        assert text == f"<MSGSTART> {before}<IMGSTART>\n{rows}\n<IMGEND> {word} <MSGEND>"


def test_a_trained_tokenizers_picture_is_always_as_many_tokens(kind: str) -> None:
    for size, tokens in zip(SIZES, (8, 72, 112, 165), strict=True):
        if kind in ("trained", "bytes"):
            format = format_for(kind, size)
            lengths = {len(ids) for ids in format.picture_ids(pictures(20, size))}
            assert lengths == {format.picture_tokens} == {tokens if kind == "trained" else size * (size + 1) - 1}


def test_prompts_are_the_beginnings_of_sketches_and_answers_their_ends(kind: str) -> None:
    format = format_for(kind, 8)
    for word, picture in zip(WORDS, pictures(len(WORDS), 8), strict=True):
        ids, prompt = format.ids(word, picture).tolist(), format.drawing_prompt(word).tolist()
        assert ids[: len(prompt)] == prompt
        assert (format.picture(ids[len(prompt) : ids.index(format.img_end)]) == picture).all()
        unnamed = format.ids(word, picture, word_before=False).tolist()
        asked, answer = format.naming_prompt(picture).tolist(), format.answer(word).tolist()
        assert unnamed[: len(asked)] == asked
        assert unnamed[len(asked) :] == [*answer, *unnamed[len(asked) + len(answer) :]]
        assert len(unnamed) - len(asked) - len(answer) == (1 if kind == "trained" else 0)
    answers = [tuple(format.answer(word).tolist()) for word in WORDS]
    assert not any(a == b[: len(a)] for a, b in itertools.permutations(answers, 2))


def test_all_sketches_of_a_row_are_found_and_parts_of_others_are_none() -> None:
    format = format_for("trained", 24)
    drawn = pictures(4, 24)
    parts = [format.ids(word, picture, word_before=word == "cat") for word, picture in zip(WORDS, drawn, strict=False)]
    row = np.concatenate([parts[0][5:], *parts[1:3], [format.tokenizer.eot_id] * 3, parts[3][:-1]])
    assert [(picture.tolist(), word) for picture, word in format.sketches(row)] == [
        (drawn[1].tolist(), WORDS[1]),
        (drawn[2].tolist(), WORDS[2]),
    ]


@pytest.mark.parametrize("kind_here", ["trained", "bytes"])
@pytest.mark.parametrize(
    "text",
    ["", "\n".join(["0" * 8] * 7), "\n".join(["0" * 8] * 9), "\n".join(["0" * 8] * 7 + ["0" * 7]), "apple",
     "\n".join(["0" * 8] * 7 + ["0000a000"]), "0" * 72],
)  # fmt: skip
def test_what_is_no_picture_is_refused(kind_here: str, text: str) -> None:
    format = format_for(kind_here, 8)
    with pytest.raises(ValueError, match="these ids are not"):
        format.picture(format.tokenizer.encode(text))


def test_rows_appear_as_they_are_complete(kind: str) -> None:
    format = format_for(kind, 8)
    [picture] = pictures(3, 8)[2:]
    [ids] = format.picture_ids(picture[None])
    for length in range(len(ids) + 1):
        rows = format.rows(ids[:length])
        text = format.tokenizer.decode(ids[:length].tolist()).replace("\n", "")
        assert len(rows) == len(text) // 8
        assert (rows == picture[: len(rows)]).all()


@pytest.mark.parametrize(
    "word", ["", " ", "a\nb", " cat", "cat ", "a\tb", "<IMGEND>", "x<|endoftext|>", "a\u00a0b", "\ud800"]
)
def test_no_word_forges_what_it_is_not(word: str) -> None:
    format = format_for("bytes", 8)
    for use in (format.drawing_prompt, format.answer):
        if word:
            with pytest.raises(InputError, match="the word"):
                use(word)
    with pytest.raises(InputError, match="the word"):
        SketchFormat.fitted(load_tokenizer("bytes"), 8, ["cat", word])


def test_a_word_of_pixels_is_no_picture() -> None:
    """Even one that is as long as a picture: a picture is what stands between its tokens."""
    forged = "0101010101010101" * 4
    for kind in ("trained", "bytes"):
        format = format_for(kind, 8)
        [picture] = pictures(3, 8)[2:]
        [(found, word)] = format.sketches(format.ids(forged, picture))
        assert (found == picture).all()
        assert word == forged


def test_a_tokenizer_that_loses_something_is_refused() -> None:
    tokenizer = load_tokenizer("bytes")
    backend = tokenizer.backend
    backend.normalizer = normalizers.Lowercase()
    lowercasing = Tokenizer("lowercasing", backend, tokenizer.special_tokens)
    with pytest.raises(
        InputError, match=r"--tokenizer lowercasing does not keep a sketch of 'The Great Wall of China'"
    ):
        SketchFormat.fitted(lowercasing, 8, WORDS)
    backend.normalizer = normalizers.Replace("\n", "")
    with pytest.raises(InputError, match="does not keep a sketch of 'cat'"):
        SketchFormat.fitted(Tokenizer("without newlines", backend, tokenizer.special_tokens), 8, ["cat"])
    with pytest.raises(InputError, match="has no end-of-text token"):
        SketchFormat.fitted(Tokenizer("endless", load_tokenizer("bytes").backend, {"eos_token": "<e>"}), 8, ["cat"])


def test_a_tokenizer_says_what_its_sketches_are_wherever_it_goes(tmp_path: Path) -> None:
    for kind in ("trained", "bytes"):
        format = format_for(kind, 8)
        folder = tmp_path / kind
        folder.mkdir()
        hf.save_tokenizer(folder, format.tokenizer, 64)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / f"{kind} by transformers")
        for place in (folder, tmp_path / f"{kind} by transformers"):
            again = SketchFormat.of(load_tokenizer(str(place)))
            assert (again.size, again.words, again.has_pieces) == (8, format.words, kind == "trained")
            assert again.tokenizer.sha256 == format.tokenizer.sha256
    other = load_tokenizer(str(folder)).with_sketches({"size": 9, "words": ["dog"]})
    with_chat = other.with_special_tokens(["<|user|>"]).with_chat_template("{{ messages }}")
    assert SketchFormat.of(with_chat).words == ("dog",)
    assert SketchFormat.of(load_tokenizer("bytes")) is None
    with pytest.raises(InputError, match="its sketches are damaged"):
        SketchFormat.of(load_tokenizer("bytes").with_sketches({"size": 8, "words": ["dog"]}))
    assert SketchFormat.of(format.tokenizer.with_sketches({"size": 8, "words": ["dog"]})).stroke_width == 1
    wide = {"size": 8, "words": ["dog"], "stroke_width": "2"}
    for damaged in (wide, {"size": 0, "words": []}, {"size": "8", "words": []}, {"size": 8, "words": [1]}, {}):
        with pytest.raises(InputError, match="its sketches are damaged"):
            SketchFormat.of(format.tokenizer.with_sketches(damaged))


def test_sketches_of_several_sizes_have_a_tokenizer_each(tmp_path: Path) -> None:
    """A tokenizer that was trained for another size lacks the pieces, and says so."""
    assert not SketchFormat(tokenizer_for("trained", 24), 28, WORDS).has_pieces
    with pytest.raises(InputError, match="does not keep a sketch"):
        SketchFormat.fitted(tokenizer_for("trained", 24), 28, WORDS)


def test_a_run_knows_the_sketches_of_its_data_not_those_that_its_model_learned_before(tmp_path: Path) -> None:
    base = format_for("bytes", 8).tokenizer
    sketches = {"model": ["cat", "dog"], "a": ["apple", "bee"], "b": ["bee", "ant"]}
    for name, words in sketches.items():
        write_split(tmp_path / name, np.zeros(400), shards=1)
        base.with_sketches({"size": 8, "words": words, "stroke_width": 2}).save(tmp_path / name)
    write_split(tmp_path / "text", np.zeros(400), shards=1)
    model = ModelConfig(vocab_size=300, seq_length=16)
    train = dataclasses.replace(TrainConfig(), train_batch_size=1, gradient_accum_step=1)

    def words_of(*names: str) -> list[str]:
        folders = tuple(f"{tmp_path / name}=1" if len(names) > 1 else str(tmp_path / name) for name in names)
        data = DataConfig(folders, str(tmp_path / "text"))
        config = RunConfig(data=data, model=model, train=train)
        opened = TrainingData.open(config, BatchPlan.of(train, 1), tmp_path / "model", 0, 1)
        return list(SketchFormat.of(opened.tokenizer).words)

    assert words_of("a") == ["apple", "bee"]
    assert words_of("text", "a", "b") == ["apple", "bee", "ant"]
    assert words_of("text") == ["cat", "dog"]
    for size, width, several in ((9, 2, "sizes"), (8, 1, "stroke-widths")):
        base.with_sketches({"size": size, "words": ["ant"], "stroke_width": width}).save(tmp_path / "b")
        with pytest.raises(InputError, match=f"--train-dir holds sketches of several {several}"):
            words_of("a", "b")


def test_the_card_of_a_model_of_sketches_says_how_to_draw_and_recognise() -> None:
    config = ModelConfig(vocab_size=8, seq_length=4, d_model=4, num_layers=1, num_heads=1)
    card = card_of_model("name", "x", config, {}, format_for("bytes", 24).tokenizer)
    assert "python generate.py --model name --draw WORD" in card
    assert "Once upon" not in card
    assert "recognise.py my-drawing.png --model you/it\n" in published(card, "name", "you/it", None, "", "", False)
