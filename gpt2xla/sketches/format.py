"""A sketch as text and as token ids: `<MSGSTART> apple <IMGSTART> rows of 0 and 1 <IMGEND> apple <MSGEND>`.

The word before the picture says what to draw, the word after it what was drawn. A model that always sees the word before
learns to copy it instead of looking at the picture, so it may be left out of a share of the sketches. Ids are put together
from special tokens, words and pictures, and are those of the text. A word is always encoded as letters.

A picture is (size, size) of bool; true is ink.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError
from gpt2xla.sketches.tokenizer import (
    IMGEND,
    IMGSTART,
    MSGEND,
    MSGSTART,
    PIECE,
    SPECIAL_TOKENS,
    check_word,
    piece_ids,
    with_sketch_tokens,
)

Picture = np.ndarray


class SketchFormat:
    """Writes and reads sketches with one tokenizer.

    Attributes:
        tokenizer: it has the special tokens.
        size: rows of a picture, and pixels of a row.
        words: what the drawings of the data are of.
        stroke_width: of the data's pen, in pixels.
        img_end: id of the token that ends a picture.
        picture_tokens: the most ids that a picture may have.
        has_pieces: whether each picture has exactly so many, which are pieces of rows, without newlines.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, words: Sequence[str], stroke_width: int = 1) -> None:
        if tokenizer.eot_id is None:
            raise InputError(f"--tokenizer {tokenizer.name} has no end-of-text token; choose one that has an eos_token")
        found: Any = [tokenizer.backend.token_to_id(token) for token in SPECIAL_TOKENS]
        assert None not in found, f"{tokenizer.name} lacks the tokens of sketches"
        self.tokenizer, self.size, self.words, self.stroke_width = tokenizer, size, tuple(words), stroke_width
        self._msg_start, self._img_start, self._msg_end = found[0], found[1], found[3]
        self.img_end: int = found[2]
        self._pieces = piece_ids(tokenizer, size)
        self.has_pieces = self._pieces is not None
        self.picture_tokens = size * -(-size // PIECE) if self.has_pieces else size * (size + 1) - 1
        self._word_ids: dict[str, np.ndarray] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SketchFormat | None:
        """Return the format that a tokenizer says its sketches have, or None. Raises InputError if they cannot be read."""
        if (stated := tokenizer.sketches) is None:
            return None
        match {"stroke_width": 1} | stated:
            case {"size": int(size), "words": [*words], "stroke_width": int(width)} if min(size, width) > 0 and all(
                isinstance(word, str) for word in words
            ):
                missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.added]
                if not missing:
                    return cls(tokenizer, size, words, width)
        fix = "copy tokenizer.json and tokenizer_config.json again"
        raise InputError(f"tokenizer {tokenizer.name}: its sketches are damaged (size, words or special tokens); {fix}")

    @classmethod
    def of_model(cls, name: str, tokenizer: Tokenizer) -> SketchFormat:
        """Return the format of the sketches that the model `name` was trained on. Raises InputError if there is none."""
        if (format := cls.of(tokenizer)) is None:
            fix = "train one on what scripts/prepare_sketches.py writes"
            raise InputError(f"--model {name} was not trained on sketches; {fix}")
        return format

    @classmethod
    def fitted(cls, tokenizer: Tokenizer, size: int, words: Sequence[str], stroke_width: int = 1) -> SketchFormat:
        """Return the format of new data with any tokenizer, which gets the special tokens. Raises InputError if it has no
        end of text, cannot take the tokens or a word, or does not encode the text of a sketch as its parts."""
        for word in words:
            check_word(word, [*tokenizer.added, *SPECIAL_TOKENS])
        format = cls(with_sketch_tokens(tokenizer, size, words, stroke_width), size, words, stroke_width)
        reader = format.tokenizer.reading_special_tokens()
        picture = np.arange(size**2).reshape(size, size) % 3 == 0
        for word in words:
            ids = format.ids(word, picture)
            if reader.encode(format.text(word, picture)) != ids[1:].tolist():
                why = "it takes text near special tokens as a part of them, or never reads these"
                raise InputError(f"--tokenizer {tokenizer.name}: transformers encodes sketches in another way: {why}")
            try:
                if [(kept.tolist(), name) for kept, name in format.sketches(ids)] == [(picture.tolist(), word)]:
                    continue
            except ValueError:
                pass
            raise InputError(
                f"--tokenizer {tokenizer.name} does not keep a sketch of {word!r}; choose another, such as gpt2"
            )
        return format

    def text(self, word: str, picture: Picture, word_before: bool = True) -> str:
        """Return a sketch as text."""
        before = f" {word}" if word_before else ""
        return f"{MSGSTART}{before} {IMGSTART}\n{picture_text(picture)}\n{IMGEND} {word} {MSGEND}"

    def ids(self, word: str, picture: Picture, word_before: bool = True) -> np.ndarray:
        """Return end-of-text, with which every document begins, and the ids of a sketch's text, (T,)."""
        return self.batch_ids([word], np.asarray(picture)[None], [word_before])[0]

    def batch_ids(self, words: Sequence[str], pictures: np.ndarray, words_before: Iterable[bool]) -> list[np.ndarray]:
        """Return the `ids` of many sketches; `pictures` are (N, size, size)."""
        return [
            np.concatenate([self.drawing_prompt(word if before else ""), picture, self._ending(word)])
            for word, picture, before in zip(words, self.picture_ids(pictures), words_before, strict=True)
        ]

    def picture_ids(self, pictures: np.ndarray) -> Sequence[np.ndarray]:
        """Return the ids of each picture of (N, size, size), without the tokens around it."""
        assert pictures.shape[1:] == (self.size, self.size)
        assert pictures.dtype == np.bool_
        if self._pieces is None:
            encoded = self.tokenizer.encode_batch([picture_text(picture) for picture in pictures])
            return [np.asarray(ids, dtype=self.tokenizer.dtype) for ids in encoded]
        packed = np.packbits(pictures, axis=2)  # the last byte of a row is filled with zeros
        whole, rest = divmod(self.size, PIECE)
        ids = np.empty(packed.shape, dtype=self.tokenizer.dtype)
        if whole:
            ids[:, :, :whole] = self._pieces[PIECE][packed[:, :, :whole]]
        if rest:
            ids[:, :, whole] = self._pieces[rest][packed[:, :, whole] >> (PIECE - rest)]
        return list(ids.reshape(len(pictures), -1))

    def drawing_prompt(self, word: str) -> np.ndarray:
        """Return the ids after which a picture of `word` follows; with an empty word, of anything."""
        ids = self._ids_of(word) if word else np.empty(0, dtype=self.tokenizer.dtype)
        return self._special(self.tokenizer.eot_id, self._msg_start, *ids, self._img_start)

    def naming_prompt(self, picture: Picture) -> np.ndarray:
        """Return the ids after which the word for `picture` follows."""
        [ids] = self.picture_ids(np.asarray(picture)[None])
        return np.concatenate([self.drawing_prompt(""), ids, self._special(self.img_end)])

    def answer(self, word: str) -> np.ndarray:
        """Return the ids of a word as they follow a naming prompt, (T,): with the token that ends the sketch, so that no
        word's are the beginning of another's, unless all words are single tokens."""
        return self._ids_of(word) if self.has_single_tokens else self._ending(word)[1:]

    @cached_property
    def has_single_tokens(self) -> bool:
        """Whether each of the words is one token."""
        return all(len(self._ids_of(word)) == 1 for word in self.words)

    def picture(self, ids: Sequence[int] | np.ndarray) -> Picture:
        """Return the picture that has these ids. Raises ValueError if none has."""
        lines = self._lines(ids)
        if len(lines) != self.size or len(lines[-1]) != self.size:
            raise ValueError(f"these ids are not {self.size} rows of {self.size} pixels")
        return _pixels(lines, self.size)

    def rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the whole rows, (R, size), of a picture that begins with these ids. Raises ValueError if none does."""
        return _pixels([line for line in self._lines(ids) if len(line) == self.size], self.size)

    def sketches(self, ids: Sequence[int] | np.ndarray) -> list[tuple[Picture, str]]:
        """Return the pictures that stand in these ids, such as a row of the data's, and the words after them. Raises
        ValueError if there is something else where a picture should be."""
        row = np.asarray(ids)
        marks = [self._img_start, self.img_end, self._msg_end]
        places = np.flatnonzero(np.isin(row, [self._msg_start, *marks]))
        found = []
        for start, end, last in zip(places, places[1:], places[2:], strict=False):
            if [row[start], row[end], row[last]] == marks:
                found.append((self.picture(row[start + 1 : end]), self.tokenizer.decode(row[end + 1 : last].tolist())))
        return found

    def check_word(self, word: str, option: str) -> None:
        """Raise InputError, which names `option`, if no sketch can be of this word."""
        check_word(word, list(self.tokenizer.added), option)

    def _lines(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the rows of a picture that begins with these ids, the last one perhaps in part. Raises ValueError."""
        text = self.tokenizer.decode(np.asarray(ids).tolist())
        lines = text.split("\n")
        if self.has_pieces:
            lines = [text[start : start + self.size] for start in range(0, len(text), self.size)]
        fits = len(lines) <= self.size and len(lines[-1] if lines else "") <= self.size
        if not fits or set("".join(lines)) - set("01") or any(len(line) != self.size for line in lines[:-1]):
            raise ValueError(f"these ids are not the beginning of {self.size} rows of {self.size} pixels")
        return lines

    def _ids_of(self, word: str) -> np.ndarray:
        if word not in self._word_ids:
            self.check_word(word, "the word")
            self._word_ids[word] = np.array(self.tokenizer.encode(word), dtype=self.tokenizer.dtype)
        return self._word_ids[word]

    def _ending(self, word: str) -> np.ndarray:
        return self._special(self.img_end, *self._ids_of(word), self._msg_end)

    def _special(self, *ids: int | None) -> np.ndarray:
        return np.array(ids, dtype=self.tokenizer.dtype)


def _pixels(lines: Sequence[str], size: int) -> np.ndarray:
    return (np.frombuffer("".join(lines).encode(), dtype=np.uint8) == ord("1")).reshape(-1, size)


def picture_text(picture: Picture) -> str:
    """Return the rows of a picture as lines of 0 and 1."""
    lines = np.full((len(picture), len(picture) + 1), ord("\n"), dtype=np.uint8)
    lines[:, :-1] = np.where(picture, ord("1"), ord("0"))
    return lines.tobytes()[:-1].decode()
