"""Records of drawings as Arrow reads them against Python's json, and what is no drawing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from test_strokes import QUICKDRAW

from gpt2xla.errors import InputError
from gpt2xla.sketches import quickdraw
from gpt2xla.sketches.quickdraw import Lines, Records

SEED = 7


def read(*records: Any) -> Records:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    return quickdraw.read(Lines("\n".join(lines).encode(), 1, "a.ndjson"), SEED)


def plainly(records: Records) -> list[tuple[str, bool, list[list[list[float]]]]]:
    """Word, whether it was recognised, and strokes as lists of x and y of each record."""
    points = np.split(records.drawings.points, np.cumsum(records.drawings.strokes)[:-1], axis=1)
    strokes = iter([part.tolist() for part in points])
    held = [[next(strokes) for _ in range(count)] for count in records.drawings.drawings.tolist()]
    words = [records.words[number] for number in records.word.tolist()]
    return list(zip(words, records.recognized.tolist(), held, strict=True))


def test_raw_and_simplified_records_are_read_alike() -> None:
    lines = [line for file in sorted(QUICKDRAW.glob("*.ndjson")) for line in file.read_text().splitlines()]
    values = [json.loads(line) for line in lines]
    assert {len(stroke) for value in values for stroke in value["drawing"]} == {2, 3}
    read_by_json = [(v["word"], v["recognized"], [stroke[:2] for stroke in v["drawing"]]) for v in values]
    records = read(*lines[:20], "", *lines[20:])
    assert plainly(records) == read_by_json
    assert len(set(records.keys.tolist())) == len(lines)
    chosen = np.arange(len(lines)) % 3 == 1
    assert plainly(records.only(chosen)) == [value for value, kept in zip(read_by_json, chosen, strict=True) if kept]


def test_a_key_depends_on_key_id_and_seed_or_else_on_word_and_strokes() -> None:
    def key(seed: int, **values: Any) -> int:
        line = json.dumps({"word": "a", "drawing": [[[1, 2], [3, 4]]]} | values).encode()
        return int(quickdraw.read(Lines(line, 1, "x"), seed).keys[0])

    assert key(1, key_id="5") == key(1, key_id="5", word="b", drawing=[]) == key(1, key_id=5)
    different = [key(1, key_id="5"), key(2, key_id="5"), key(1, key_id="6"), key(1), key(2), key(1, word="b")]
    different.append(key(1, drawing=[[[1, 2], [3, 5]]]))
    assert len(set(different)) == len(different)
    assert key(1) == key(1, key_id=None) == key(1, key_id="", countrycode="DE")


def test_numbers_that_arrow_does_not_read_are_read() -> None:
    """Then Python reads the lines, as it does where a key_id is a number."""
    huge = '{"word": "a", "drawing": [[[1, 1e400, -1e400, 1%s], [1, 2, 3, 4]]]}' % ("0" * 400)
    ordinary = '{"word": "b", "key_id": 5, "recognized": true, "drawing": [[[1, NaN], [9007199254740993, 2]]]}'
    (_, _, first), (_, recognized, second) = plainly(read(huge, ordinary))
    assert first == [[[1, np.inf, -np.inf, np.inf], [1, 2, 3, 4]]]
    assert recognized is True
    assert np.array_equal(second[0], [[1, np.nan], [9007199254740992, 2]], equal_nan=True)


def test_strokes_without_a_point_and_drawings_without_a_stroke_do_not_shift_the_others() -> None:
    def record(word: str, *strokes: list) -> dict:
        return {"word": word, "drawing": list(strokes)}

    dot, line = [[1], [2]], [[3, 4], [5, 6]]
    found = read(record("a"), record("b", [[], []], line), record("c", [[], [], []]), record("d", dot, [[], []], line))
    assert plainly(found) == [("a", False, []), ("b", False, [line]), ("c", False, []), ("d", False, [dot, line])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"word": "a", "drawing": [[[1, 2], [3,', "is not JSON"),
        ("<!DOCTYPE html>", "is not JSON"),
        ("null", "is JSON, but not a drawing such as"),
        ("[1, 2]", "is JSON, but not a drawing such as"),
        ('{"text": "a"}', "is JSON, but not a drawing such as"),
        ('{"word": "a"}', "is JSON, but not a drawing such as"),
        ('{"word": null, "drawing": []}', "is JSON, but not a drawing such as"),
        ('{"word": 5, "drawing": []}', "is JSON, but not a drawing such as"),
        ('{"word": "a", "drawing": {}}', "is JSON, but not a drawing such as"),
        ('{"word": "a\\ud800", "drawing": []}', "holds half a character"),
        ('{"word": "a", "drawing": [[[1], [2]], [[1]]]}', ": stroke 2 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [[]]}', ": stroke 1 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [[[1], [2], [3], [4]]]}', ": stroke 1 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [[[1, 2], [3]]]}', ": stroke 1 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [[[1, 2], [3, 4], [5]]]}', ": stroke 1 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [[[1, null], [3, 4]]]}', ": stroke 1 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [[[1, true], [3, 4]]]}', ": stroke 1 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [[[1, "2"], [3, 4]]]}', ": stroke 1 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [null]}', ": stroke 1 of its drawing is not two or three lists"),
        ('{"word": "a", "drawing": [[["x"], ["y"]]]}', ": stroke 1 of its drawing is not two or three lists"),
    ],
)
def test_what_is_no_drawing_is_named_by_its_line(line: str, message: str) -> None:
    right = {"word": "a", "drawing": [[[1, 2], [3, 4], [5, 6]], [[7], [8]]]}
    for before in ([], [right, "", right]):
        with pytest.raises(InputError) as caught:
            read(*before, line, *before)
        assert str(caught.value).startswith(f"a.ndjson, line {len(before) + 1}")
        assert message in str(caught.value)
    with pytest.raises(InputError, match="bytes that are not UTF-8"):
        quickdraw.read(Lines(b'{"word": "a\xff", "drawing": []}', 1, "a.ndjson"), SEED)
