"""Files of every format: what is read is what Python's own readers find in them; what is not sure is refused in a line."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from data.sample_files import (
    COMPRESSIONS,
    CONTAINERS,
    EVERY,
    TABLE,
    TEXTS,
    WHOLE,
    arrow,
    by_arrow,
    delimited,
    for_train,
    parquet,
    prepared,
    read,
    write,
)

from gpt2xla.data.documents import text_file
from gpt2xla.data.documents.corpus import documents_of, local_parts, remote_part
from gpt2xla.data.documents.reading_options import Reading
from gpt2xla.errors import InputError, counted


@pytest.mark.parametrize("name", [*(n + c for n in CONTAINERS for c in COMPRESSIONS), *WHOLE])
def test_every_container_in_every_compression(name: str, tmp_path: Path) -> None:
    compression = next((c for c in COMPRESSIONS if c and name.endswith(c)), "")
    content, expected = (CONTAINERS | WHOLE)[name.removesuffix(compression)]
    packed, said = COMPRESSIONS[compression](content), []
    assert read(write(tmp_path, name, packed), said) == expected
    assert read(write(tmp_path, name, packed), said, format=read_as(name)) == expected
    if compression:  # members one after the other; one codec within another; under another name
        half = len(content) // 2
        members = COMPRESSIONS[compression](content[:half]) + COMPRESSIONS[compression](content[half:])
        assert read(write(tmp_path, name, members)) == expected
        assert read(write(tmp_path, name, gzip.compress(packed))) == expected
        assert read(write(tmp_path, name.removesuffix(compression), packed)) == expected
    assert said == []


def test_streams_of_xz_may_have_zeros_between_them(tmp_path: Path) -> None:
    packed = bytes(4).join(lzma.compress(line) for line in (b"one\n", b"two\n", b"")) + bytes(70_000)
    assert read(write(tmp_path, "a.txt.xz", packed)) == ["one", "two"]


def read_as(name: str) -> str:
    for part in ("parquet", "arrow", "csv", "tsv", "txt"):
        if f".{part}" in name:
            return part.replace("txt", "text")
    return "jsonl" if name.startswith("lines") else "json"


def test_feather_and_what_datasets_writes_is_arrow(tmp_path: Path) -> None:
    pyarrow.feather.write_feather(TABLE, str(tmp_path / "a.feather"))
    assert read(tmp_path / "a.feather") == TEXTS
    dictionary = TABLE.set_column(1, "text", TABLE["text"].dictionary_encode())
    assert read(write(tmp_path, "d.parquet", parquet(dictionary))) == TEXTS
    assert read(write(tmp_path, "none.parquet", parquet(TABLE[:0]))) == []


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", CONTAINERS["lines.jsonl"]), ("a.csv", CONTAINERS["objects.json"]), ("a", CONTAINERS["strings.json"]),
    ("a.jsonl", WHOLE["table.parquet"]), ("a.md", WHOLE["file.arrow"]), ("a.txt", CONTAINERS["stream.arrow"]),
    ("a.jsonl.gz", CONTAINERS["stream.arrow"]), ("a.parquet", CONTAINERS["lines.json"]),
])  # fmt: skip
def test_certain_content_is_read_under_another_name_with_a_note(
    name: str, content: tuple[bytes, list[str]], tmp_path: Path
) -> None:
    said: list[str] = []
    assert read(write(tmp_path, name, content[0]), said) == content[1]
    (line,) = said
    assert line.startswith(f"note: {tmp_path / name} holds ")
    assert line.endswith(" and is read as such (--format text would keep it as text)")


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.txt", "text")
    return stream.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (text)")
    return connection.serialize() if hasattr(connection, "serialize") else b"SQLite format 3\0"


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
STREAM = arrow("stream")
REFUSED: dict[str, tuple[bytes, str]] = {
    "a.zip": (archive(), "is a zip archive"),
    "zip.txt": (archive(), "is a zip archive"),
    "a.txt.gz": (gzip.compress(archive()), "is a zip archive"),
    "a.tar.gz": (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar" + bytes(200)), "is a tar archive"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
    "a.pkl": (pickle.dumps(TEXTS), "is a pickle"),
    "a.npy": (saved(np.arange(9)), "is a .npy array"),
    "a.sqlite": (database(), "is an SQLite database"),
    "a.h5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "a.gguf": (b"GGUF\x03\0\0\0", "is a GGUF model"),
    "a.pdf": (b"%PDF-1.7\ntext", "is a PDF"),
    "image.txt": (b"\x89PNG\r\n\x1a\n", "is an image"),
    "program.txt": (b"\x7fELF\x02\x01", "is a program"),
    "a.safetensors": (struct.pack("<Q", 20) + b'{"__metadata__": {}}', "is a safetensors file"),
    "feather1.arrow": (b"FEA1\0\0\0\0", "is Feather version 1"),
    "lfs.parquet": (LFS, "is a Git LFS pointer; run `git lfs pull`"),
    "lfs.txt": (LFS, "is a Git LFS pointer; run `git lfs pull`"),
    "legacy.lz4": (b"\x02\x21\x4c\x18\1\0\0\0", "lz4's legacy format"),
    "wiki.xml.bz2": (bz2.compress(b"<mediawiki xmlns='x'>"), "is a MediaWiki dump"),
    "a.xml.gz": (gzip.compress(b"<?xml version='1.0'?>"), "is XML"),
    "error.parquet": (b"<!DOCTYPE html><html>404", "holds an HTML page, perhaps of an error, not parquet"),
    "error.jsonl": (b"\n<html>", "holds an HTML page, perhaps of an error, not JSON lines"),
    "error.csv": (b"<HTML>\n", "holds an HTML page, perhaps of an error, not CSV"),
    "prose.jsonl": (b"Once upon a time", "holds text, not JSON lines"),
    "prose.parquet": (b"Once upon a time", "holds text, not parquet"),
    "prose.txt.gz": (b"Once upon a time", "holds plain text, though its name says compressed"),
    "prose.bin": (b"Once upon a time", "is text under a name that ends in .bin"),
    "empty.parquet": (b"", "holds nothing, not parquet"),
    "empty.txt.gz": (b"", "is empty, though"),
    "utf32.txt": ("text".encode("utf-32"), "is text in UTF-32"),
    "cut.gz": (gzip.compress(b"text" * 99)[:-1], "cannot be read (Truncated"),
    "cut.xz": (lzma.compress(b"text" * 99)[:-1], "cannot be read (Truncated"),
    "cut.zst": (by_arrow("zstd")(b"text" * 99)[:-1], "cannot be read (Truncated"),
    "tail.gz": (gzip.compress(b"text") + b"tail", "cannot be read"),
    "tail.xz": (lzma.compress(b"text") + b"tail", "cannot be read"),
    "crawl.warc.wet.gz": (gzip.compress(b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\ntext"), "is a web archive"),
    "japanese.txt": ("漢字".encode("iso2022_jp"), "is text in ISO-2022-JP"),
    "two.bytes": (b"\x1f\x8b", "is cut off"),
    "thrice.gz": (gzip.compress(gzip.compress(gzip.compress(b"x"))), "compressed more than 2 times"),
    "a.parquet.gz": (gzip.compress(parquet()), "is parquet compressed once more (gzip)"),
    "between.arrow": (STREAM[:-8], "has no end: it is cut off"),
    "between.arrow.gz": (gzip.compress(STREAM[:-8]), "has no end: it is cut off"),
    "twice.arrow": (STREAM + STREAM, "holds more after the end"),
    "columns.arrow": (parquet(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text"] * 2)), "has 2 columns 'text'"),
    "data.json": (b'{"data": [{"text": "a"}]}', "jq -c '.data[]'"),
    "frame.json": (b'{"text": {"0": "a"}}', "the field 'text' holds an object, not text"),
    "numbers.json": (b"[1, 2]", "value 1: neither an object nor text"),
    "number.json": (b'[{"text": 1, "body": "b"}]', "value 1: the field 'text' holds a number, not text; text is in body"),
    "none.json": (b'[{"body": "b"}]', "which hold body; text is in body; choose with --text-column"),
    "early.json": (b'[{"text": "a"}', "(it ends early)"),
    "late.json": (b'[{"text": "a"}] b', "(there is more after its array)"),
    "commas.json": (b'{"text": "a"},\n{"text": "b"}', "at or after value 2"),
    "deep.json": (b'[{"text": "a", "x": ' + b"[" * 99_999, "nested too deeply"),
    "half.json": (b'["\\ud800"]', "value 1, holds half a character"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2, holds half a character"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "line 2, is not JSON"),
    "json.txt": (b'{"title": "x"}\nA text', "or keep all of it as text with --format text"),
    "open.txt": (b'{"text": "abc', "or keep all of it as text with --format text"),
    "table.txt": (delimited(","), "looks like CSV with a column 'text'; give --format csv or text"),
    "tabs.txt": (delimited("\t"), "looks like TSV"),
    "ragged.csv": (b"id,text\n1,a\n2,b,c\n", "line 3: 3 columns, but the header has 2"),
    "quote.csv": (b'id,text\n1,"a\n', "line 2: unexpected end of data"),
    "quotes.tsv": (b'id\ttext\n1\t"a" b\n', "line 2: "),
    "header.csv": (b"id,body\n1,a\n", "its first line, the header, has id, body; choose with --text-column"),
    "names.csv": (b"text,text\n1,a\n", "its header names 'text' 2 times"),
    "latin.csv": ("text\nnaïve\n".encode("latin-1"), "holds bytes that are not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_sure_is_refused_by_name_with_the_fix(name: str, tmp_path: Path) -> None:
    content, words = REFUSED[name]
    with pytest.raises(InputError) as raised:
        read(write(tmp_path, name, content))
    assert str(raised.value).startswith(str(tmp_path / name))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("brackets.txt", b"[1] A note", ["[1] A note"]), ("link.md", b"[link](there)", ["[link](there)"]),
    ("braces.txt", b"{{title}}", ["{{title}}"]), ("dict.py", b"{'text': 'a'}", ["{'text': 'a'}"]),
    ("words.txt", b"PARENTS, GGUF", ["PARENTS, GGUF"]), ("bz.txt", b"BZh91 is a name", ["BZh91 is a name"]),
    ("page.html", b"<html>kept", ["<html>kept"]), ("list.txt", b"a,b\nc,d", ["a,b", "c,d"]),
    ("empty.txt", b"", []), ("empty.jsonl", b"", []), ("blank.json", b" \n", []), ("none.json", b"[]", []),
    ("empty.csv", b"", []), ("header.csv", b"id,text\n", []), ("empty.txt.gz", gzip.compress(b"", mtime=0), []),
    ("nan.json", b'[{"n": NaN, "text": "a", "x": ' + b"9" * 5000 + b"}]", ["a"]), ("nul.json", b'["a\\u0000"]', ["a\0"]),
    ("one.csv", b'text\n"a,b"\nc\n', ["a,b", "c"]), ("crlf.csv", b'text,n\r\n"a\r\nb",1\r\n', ["a\r\nb"]),
    ("nulls.jsonl", b'{"text": "a"}\n\n{"text": null}\nnull\n{"n": 1}\n{"text": ""}', ["a"]),
    ("last.jsonl", b'{"text": "a"}\n{"n": 1}', ["a"]),
])  # fmt: skip
def test_edges(name: str, content: bytes, expected: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    assert read(write(tmp_path, name, content), said) == expected
    without = {"nulls.jsonl": 4, "last.jsonl": 1}.get(name)
    left_out = f"note: {tmp_path / name}: left out {counted(without or 0, 'record')} without text"
    assert said == ([left_out] if without else [])


def test_long_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few bytes and characters, so that everything lies across two of them somewhere."""
    for module in ("json_lines.LONGEST", "json_values._BLOCK_CHARACTERS", "corpus._ARRAY_CHARACTERS"):
        monkeypatch.setattr(f"gpt2xla.data.documents.{module}", 150)
    for size in (1, 2, 3, 7, 20):
        monkeypatch.setattr(text_file, "_BLOCK_BYTES", size)
        monkeypatch.setattr("gpt2xla.data.documents.json_values._BLOCK_CHARACTERS", size)
        for name, (content, expected) in CONTAINERS.items():
            assert read(write(tmp_path, name, content)) == expected, (name, size)
        text = "one<|endoftext|>two\n<|endoftext|> \n<|endoftext|>\n<|endof<|endoftext|>text|>"
        file = write(tmp_path, "a.txt", text.encode())
        assert read(file, split_by="endoftext") == ["one", "two", "<|endof", "text|>"]
        assert read(file, split_by="file") == [text]


STORY = "Once upon a time there was a cat.\n\nThe cat was happy.\n<|endoftext|>\n"


def test_the_file_names_of_c4_are_json_lines(tmp_path: Path) -> None:
    texts = [f"document {n} café\nhas two lines" for n in range(5)]
    lines = "".join(json.dumps({"text": text, "url": "https://example.org/a"}) + "\n" for text in texts)
    file = write(tmp_path, "c4-train.00000-of-01024.json.gz", gzip.compress(lines.encode()))
    assert prepared(for_train(file, tmp_path, []), tmp_path / "out") == texts


def test_files_of_the_hub_are_recognised_when_they_are_here(tmp_path: Path) -> None:
    said: list[str] = []
    for name, (content, expected) in EVERY.items():
        opened = functools.partial(contextlib.nullcontext, write(tmp_path, "fetched", content))
        part = remote_part(f"me/set/{name}", "hash", len(content), opened, Reading(split_by="line"), None, said.append)
        assert list(documents_of([part])) == expected
        (local,) = local_parts([write(tmp_path, name, content)], split_by="line")
        assert (part.name, part.how) == (f"me/set/{name}@hash", local.how)
    assert [line for line in said if line.startswith("note")] == []


@pytest.mark.parametrize("split_by", ["endoftext", "file"])
def test_separators_of_documents_are_borders_if_asked_and_named_if_not(split_by: str, tmp_path: Path) -> None:
    said: list[str] = []
    file = write(tmp_path, "TinyStoriesV2-valid.txt", (STORY * 30).encode())
    found = prepared(for_train(file, tmp_path, said, split_by=split_by), tmp_path / "out")
    assert found == ([STORY.split("\n<")[0]] * 30 if split_by == "endoftext" else [STORY * 30])
    assert [line.replace(str(file), "FILE") for line in said] == ([] if split_by == "endoftext" else [
        "warning: FILE holds <|endoftext|> as text; --split-by endoftext splits documents there",
        "warning: FILE: <|endoftext|> was read as text, 30 times (--split-by endoftext splits there)",
    ])  # fmt: skip
