"""What the canvas sends is text from somewhere: strokes and files are read, all else is refused."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from gpt2xla.errors import InputError

canvas = pytest.importorskip("gpt2xla.playground.canvas", reason="needs Gradio: pip install -e '.[playground]'")


def test_strokes_and_files_are_read() -> None:
    first, second = canvas.read("[[[0, 1000], [5, 6]], [[7, 8]]]")
    assert np.array_equal(first, [[0, 1000], [5, 6]])
    assert np.array_equal(second, [[7, 8]])
    assert canvas.read(None) == canvas.read("") == canvas.read("[]") == []
    content = bytes(range(256))
    assert canvas.read("data:image/png;base64," + base64.b64encode(content).decode()) == content


@pytest.mark.parametrize(
    "sent",
    [
        7, ["[]"], "null", "7", '"abc"', '{"a": 1}', "{", "[[]]", "[[1, 2]]", "[[[1]]]", "[[[1, 2, 3]]]", "[[[1, 2], [3]]]",
        '[["ab"]]', "[[[NaN, 1]]]", "[[[1e999, 1]]]", "[[[1.5, 1]]]", "[[[-1, 1]]]", "[[[0, 1001]]]", "[[[true, false]]]",
        f"[[[1{'0' * 30}, 1]]]", f"[[[1{'0' * 5000}, 1]]]", "[" * 100_000, "\ud800", "data:x;base64,A",
    ],
)  # fmt: skip
def test_nothing_else_is(sent: object) -> None:
    with pytest.raises(InputError, match="neither strokes nor a file; reload the page"):
        canvas.read(sent)


def test_too_much_is_refused() -> None:
    with pytest.raises(InputError, match="too many points"):
        canvas.read("[" + ",".join(["[[0,0]]"] * 30_000) + "]")
    with pytest.raises(InputError, match="more than 8 MB"):
        canvas.read("data:;base64," + "A" * 12_000_000)
