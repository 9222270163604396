"""Cut, renamed and random files: they give the documents that are in them, or are refused in one line."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from data.sample_files import COMPRESSIONS, EVERY, for_train, prepared, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2xla.errors import InputError

SUFFIXES = [
    ".txt", ".md", "", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".gz", ".json.gz", ".zst",
    ".npy",
]  # fmt: skip
DELIMITERS = {"comma.csv": ",", "semicolon.csv": ";", "tab.tsv": "\t"}
COMPRESSED = st.sampled_from(sorted(COMPRESSIONS))


def documents_in(kind: str, content: bytes) -> list[str] | None:
    """What Python's own readers make of the content, which may be cut; None if they cannot read it."""
    whole, documents = EVERY[kind]
    if content == whole:
        return documents
    text = content.decode("utf-8-sig", errors="replace")
    try:
        if kind in DELIMITERS:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[kind])
            return [row[1] for row in rows if row and row[1]][1:]
        found, at, decoder = [], 0, json.JSONDecoder()
        while kind.startswith(("lines", "pretty")) and (at := len(text) - len(text[at:].lstrip())) < len(text):
            value, at = decoder.raw_decode(text, at)
            found.append(value["text"])
    except (ValueError, IndexError, csv.Error):
        return None
    return found or None


def as_text(content: bytes) -> list[str]:
    """By lines, as asked."""
    text = content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return [line for line in text.split("\n") if line.strip()]


def fuzzed(test: Callable) -> Callable:
    return settings(
        max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )(test)


def outcome(suffix: str, content: bytes) -> list[str] | None:
    """The documents that reached the shards; None if it was refused, in a line."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        room = Path(folder)
        try:
            parts = for_train(write(room, f"x{suffix}", content), room, [], split_by="line")
            return prepared(parts, room / "out")
        except InputError as error:
            message = str(error)
    assert "\n" not in message
    if "split is empty" in message:
        return []
    assert f"x{suffix}" in message
    return None


@fuzzed
@given(kind=st.sampled_from(sorted(EVERY)), suffix=st.sampled_from(SUFFIXES), at=st.floats(0, 1.2), packed=COMPRESSED)
def test_cut_and_renamed_files_give_their_documents_or_nothing(kind: str, suffix: str, at: float, packed: str) -> None:
    whole, _ = EVERY[kind]
    content = whole[: int(at * len(whole))]
    found = outcome(suffix, COMPRESSIONS[packed](content))
    if found:
        is_text = kind in ("text.txt", *DELIMITERS) or len(content) < 8  # a cut header is a text
        assert found == documents_in(kind, content) or (is_text and found == as_text(content)), content


@fuzzed
@given(kind=st.sampled_from(sorted(EVERY)), suffix=st.sampled_from(SUFFIXES), packed=COMPRESSED, at=st.floats(0, 0.999))
def test_cut_archives_are_refused(kind: str, suffix: str, packed: str, at: float) -> None:
    whole = COMPRESSIONS[packed or ".gz"](EVERY[kind][0])
    cut = whole[: int(at * len(whole))]
    found = outcome(suffix, cut)
    assert not found or (len(cut) < 6 and found == as_text(cut)), found


@fuzzed
@given(content=st.binary(max_size=80), suffix=st.sampled_from(SUFFIXES))
def test_random_bytes_are_text_or_refused(content: bytes, suffix: str) -> None:
    found = outcome(suffix, content)
    assert not found or found == as_text(content), found
