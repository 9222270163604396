"""Input that cannot be prepared is refused by name with the fix; what is read with a loss is counted."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2xla.data.documents.corpus import documents_of, local_parts
from gpt2xla.data.preparation.pipeline import PrepareConfig, prepare
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.errors import InputError


@pytest.mark.parametrize("harm", ["cut parquet", "not utf-8", "no column", "no field", "not json", "cut gz"])
def test_input_that_cannot_be_read_is_named(harm: str, tmp_path: Path) -> None:
    file = tmp_path / ("x.parquet" if harm in ("cut parquet", "not utf-8", "no column") else "x.jsonl")
    table = pa.table({"text": ["a long enough text"] * 1000})
    if harm == "cut parquet":
        pq.write_table(table, file)
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "not utf-8":
        binary = pa.array([b"\xff\xfe"] * 10, pa.binary())
        pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 10, binary.buffers())}), file)
    elif harm == "no column":
        pq.write_table(table.rename_columns(["content"]), file)
    elif harm == "no field":
        file.write_text('{"content": "x"}\n' * 10)
    elif harm == "not json":
        file.write_text('{"text": "x"}\n{"text": }\n')
    else:
        file = tmp_path / "x.jsonl.gz"
        file.write_bytes(gzip.compress(b'{"text": "x"}\n' * 10_000)[:-20])
    with pytest.raises(InputError, match=f"{file.name}.*") as raised:
        prepare(local_parts([file]), load_tokenizer("bytes"), PrepareConfig(output_dir=str(tmp_path / "out")))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


LINES = '{"text": "x", "n": 1, "body": "b"}\n'
UNFIT = {
    "struct.parquet": ({"text": [{"a": 1}], "body": ["x"], "n": [1]}, ["'text' holds struct", "text is in body; choose"]),
    "list.parquet": ({"text": [["x"]], "n": [1]}, ["'text' holds list", "no column holds text"]),
    "missing.parquet": ({"body": ["x"], "n": [1]}, ["no column 'text' but body, n; text is in body"]),
    "broken.jsonl": (f'{LINES}\n{{"text": }}\n', ["line 3, is not JSON", "remove it"]),
    "array.jsonl": (f'{LINES}["x"]\n', ["line 2, is JSON, but not an object"]),
    "object.jsonl": (f'{LINES}{{"text": {{"a": 1}}, "b": "x"}}\n', ["line 2: the field 'text' holds an object", "is in b;"]),
    "missing.jsonl": (LINES.replace("text", "title"), ["which hold title, n, body; text is in title, body; choose with"]),
    "long.jsonl": (f'{LINES}{{"text": "{"x" * (40 << 20)}"}}\n', ["line 2, has 40 MiB, but only 16"]),
    "utf16.txt": ("hello".encode("utf-16"), ["is text in UTF-16; save it as UTF-8, or leave it out (--exclude)"]),
    "binary.txt": (b"GIF89a\0\1", ["is an image; give text, or leave it out (--exclude)"]),
    "late.txt": (b"x" * 200_000 + b"\0", ["holds NUL bytes"]),
    "cyrillic.txt": ("привет, мир".encode("cp1251"), ["text that is not UTF-8; convert it"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_unfit_is_named_with_the_fix(name: str, tmp_path: Path) -> None:
    content, words = UNFIT[name]
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as raised:
        list(documents_of(local_parts([tmp_path / name])))
    assert str(raised.value).startswith(str(tmp_path / name))
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_binary_file_among_texts_is_refused_at_once_and_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_bytes(b"\x7fELF\0")
    with pytest.raises(InputError, match=r"b\.txt is a program"):
        local_parts([tmp_path])
    assert list(documents_of(local_parts([tmp_path], exclude=("b.txt",)))) == ["a text"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_few_bad_bytes_are_replaced_and_counted(packed: bool, tmp_path: Path) -> None:
    """U+FFFD that is in the file itself is not one of them."""
    content = b"one \xff two \xe6\xbc three " + "\ufffd".encode() + b" text" * 100 + b"\n\xfe"
    file = tmp_path / ("a.txt.gz" if packed else "a.txt")
    file.write_bytes(gzip.compress(content) if packed else content)
    said: list[str] = []
    found = list(documents_of(local_parts([file], split_by="line", say=said.append)))
    assert "\n".join(found) == content.decode(errors="replace")
    (line,) = said
    assert line.startswith(f"warning: {file}: bytes that are not UTF-8 became U+FFFD, 3 times")
    file.write_text("another \ufffd")
    assert list(documents_of(local_parts([file], format="text", say=said.append))) == ["another \ufffd"]
    assert len(said) == 1


@pytest.mark.parametrize("harm", ["pipe", "numbers", "name"])
def test_odd_input_is_refused(harm: str, tmp_path: Path) -> None:
    if harm == "pipe":
        os.mkfifo(tmp_path / "x.txt")
    elif harm == "numbers":
        pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "x.parquet")
    else:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("x")
    with pytest.raises(InputError, match=r"not a regular file|holds int64, not text|not UTF-8"):
        prepare(local_parts([tmp_path]), load_tokenizer("bytes"), PrepareConfig(output_dir=str(tmp_path / "out")))


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "A.TXT").write_text("upper case")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "top")
    assert list(documents_of(local_parts([tmp_path / "top"]))) == ["upper case"]
