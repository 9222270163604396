"""What `prepare_sketches.py` refuses, in one line and without leaving anything behind."""

import sys
from pathlib import Path

import pytest
from conftest import run_here
from fsspec.registry import _registry as fsspec_classes
from test_prepare_sketches import ALONE, FILES, hashes, prepare, refusal


def test_a_storage_without_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(fsspec_classes, "gs", raising=False)  # by another test
    published = "gs://quickdraw_dataset/full/simplified/*.ndjson"
    assert (
        refusal("--input", published, folder=tmp_path)
        == f"--input {published} needs another package: pip install gcsfs"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "page.ndjson"], "page.ndjson, line 1, is not JSON"),
        (["--input", "cut.ndjson"], "cut.ndjson, line 4, is not JSON"),
        (["--input", "empty.ndjson"], "empty.ndjson holds no drawings; "),
        (["--input", "right.ndjson", "empty.ndjson"], "empty.ndjson holds no drawings; "),
        (["--input", "nowhere.ndjson"], "--input nowhere.ndjson: no such file or folder"),
        (["--input", "odd.ndjson"], "2 without a stroke, 2 with coordinates beyond 1,000,000 or NaN, 1 of one dot; "),
        (["--input", "special.ndjson"], "special.ndjson: the word 'a <IMGSTART> b' spells the special token <IMGSTART>"),
        (["--input", "right.ndjson", "--words", "aple"], "--words aple: no drawing is of it; did you mean 'apple'?"),
        (["--input", "right.ndjson", "--words", ""], "--words is empty"),
        (["--input", ""], "--input is empty"),
        ([], "nothing to read; name files, folders or URLs with --input"),
        (["--input", "right.ndjson", "--size", 3], "--size 3: choose from 4 to 128 pixels"),
        (["--input", "right.ndjson", "--stroke-width", 5], "--stroke-width 5: choose from 1 to 4"),
        (["--input", "right.ndjson", "--augment", -1], "--augment -1: choose from 0 to 255 copies"),
        (["--input", "right.ndjson", "--word-before", 1.5], "--word-before 1.5: choose a share from 0 to 1"),
        (["--input", "right.ndjson", "--test-fraction", 0], "--test-fraction 0.0: choose a share above 0 and below 1"),
        (["--input", "right.ndjson", "--test-fraction", 1e-9], "test/ has no drawing, with 38 drawings left of 38 read; "),
        (["--input", "right.ndjson", "--words", "sun", "--per-word", 1], "/ has no drawing; left out: 35 of other words, "),
        (["--input", "right.ndjson", "--words", "sun", "--per-word", 1, "--as-text"], "/ has no drawing; left out: 35"),
        (["--input", "right.ndjson", "--tokenizer", "bytes", "--seq-length", 600], "tokens; raise --seq-length, or give"),
        (["--input", "right.ndjson", "--per-word", 0], "--per-word 0: choose a number of at least 1"),
        (["--input", "right.ndjson", "--seq-length", 77], "--seq-length 77: a sketch of 24x24 pixels takes at least 78"),
        (["--input", "right.ndjson", "--vocab-size", 500], "--vocab-size 500: "),
        (["--input", "right.ndjson", "--tokenizer", "bytes", "--vocab-size", 500], "leave one of them out"),
        (["--input", "right.ndjson", "--as-text", "--loss-on", "word"], "leave one of them out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    flags: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = "".join(file.read_text() for file in FILES)
    odd = ["[]", "[[[], []]]", "[[[1, NaN], [2, 3]]]", "[[[1, 2], [1e300, 3]]]", "[[[5, 5], [6, 6]]]"]
    files = {
        "right": drawings,
        "page": "<!DOCTYPE html>\n<html></html>\n",
        "cut": drawings[: len("".join(drawings.splitlines(keepends=True)[:4])) - 9],
        "empty": "\n",
        "odd": "".join(f'{{"word": "a", "drawing": {drawing}}}\n' for drawing in odd),
        "special": drawings + '{"word": "a <IMGSTART> b", "drawing": [[[1, 2], [3, 4]]]}\n',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.ndjson").write_text(text)
    here = [tmp_path / flag if str(flag).endswith(".ndjson") else flag for flag in flags]
    assert message in refusal(*here, folder=tmp_path).replace(f"{tmp_path}/", "")


def test_other_options_or_files_in_a_prepared_folder_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.ndjson"
    file.write_bytes(FILES[0].read_bytes())
    prepare("--input", file, folder=tmp_path / "out")
    before = hashes(tmp_path / "out")

    def refused(*flags: object) -> str:
        result = run_here(
            "scripts/prepare_sketches.py", *ALONE, "--output-dir", tmp_path / "out", "--input", file, *flags
        )
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert hashes(tmp_path / "out") == before
        return line

    assert "was prepared with --augment 0, now 1; " in refused("--augment", 1)
    assert "was prepared with --words [], now ['apple']; " in refused("--words", "apple")
    assert "was prepared with --tokenizer left to the default, now bytes; " in refused("--tokenizer", "bytes")
    assert "was prepared with --as-text False, now True; " in refused("--as-text")
    file.write_bytes(file.read_bytes().replace(b'"apple"', b'"appla"'))
    assert f"was prepared from {file} of 67,856 bytes, sha256" in refused()
