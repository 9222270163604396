"""What inspect_data.py shows of masked rows, against the samples that they were packed from."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import random_samples, run_here, succeed

from gpt2xla.commands import inspect_data
from gpt2xla.data.preparation.rows import Sample, pack, write_rows
from gpt2xla.data.row_inspection import count_rows, sample_rows
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def sample(*runs: tuple[str, bool], end: int | None = None) -> Sample:
    """A conversation in bytes: runs of text that are trained on, or not, and at `end` the id that closes the last."""
    ids = [*"".join(text for text, _ in runs).encode(), *([] if end is None else [end])]
    trained = [is_trained for text, is_trained in runs for _ in text.encode()] + ([] if end is None else [True])
    return Sample(np.array(ids, dtype=np.uint16), np.array(trained), len(ids))


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Two rows of 320 tokens. An answer ends with the end-of-text token; two texts look like a mark and a special token."""
    samples = [
        sample(("Q: 3 + 4?\n", False), ("7", True), ("\nQ: [[é]]?\x1b[32m\n", False), ("no \\ é", True), end=256),
        sample(("short <|endoftext|> ", False), ("yes", True)),
        sample(("long " * 60, False), ("an end", True)),
    ]
    write_rows(tmp_path, samples, load_tokenizer("bytes"), row_length=320, shard_size=500, chat_template="{{ x }}")
    return tmp_path


def test_rows_are_shown_with_their_trained_tokens_marked(told: Path) -> None:
    lines = succeed(run_here("scripts/inspect_data.py", told)).splitlines()
    shown = lines[lines.index("trained tokens are shown [[so]]") + 1 :]
    end = "<|endoftext|>"
    assert shown[:3] == [
        "  row 0: 2 conversations, 12 of 320 tokens trained",
        rf"    {end}Q: 3 + 4?\n[[7]]\nQ: \[[é\]]?\x1b[32m\n[[no \\ é{end}]]",
        rf"    {end}short \{end} [[yes]]",
    ]
    long = f"{end}{'long ' * 60}"
    assert shown[3:6] == [
        "  row 1: 1 conversation, 6 of 320 tokens trained",
        f"    {long[:120]} ... {long[-40:]}[[an end]]",
        "2 rows of 320 tokens, conversations in each: mean 1.5, least 1, most 2",
    ]
    first = len(f"Q: 3 + 4?\n7\nQ: [[é]]?\x1b[32m\nno \\ é".encode()) + 2  # noqa: F541
    fill = 640 - first - len(f"short {end} yes") - 1 - len("long " * 60 + "an end") - 1
    assert shown[6] == (
        f"trained: 18 tokens, {18 / 640:.1%} of the rows; fill at the end of rows: {fill} tokens, {fill / 640:.1%}"
    )
    assert lines[1] == "3 conversations"
    assert not any("bytes per token" in line or "unigram" in line for line in lines), "of all tokens, even of the fill"


def test_an_answer_whose_end_of_text_is_not_trained_on_is_noted(tmp_path: Path) -> None:
    divided = sample(("Q\nA", False), ("\nQ\n", False), ("B", True))
    ids = divided.ids.copy()
    ids[4] = load_tokenizer("bytes").eot_id
    write_rows(tmp_path, [replace(divided, ids=ids)], load_tokenizer("bytes"), row_length=20, shard_size=100)
    found = succeed(run_here("scripts/inspect_data.py", tmp_path))
    assert "note: conversations hold 1 end-of-text token that" in found


@pytest.mark.parametrize(
    ("flags", "is_terminal", "no_color", "in_color"),
    [
        ([], False, None, False),
        ([], True, None, True),
        ([], True, "1", False),
        ([], True, "", True),  # as no-color.org has it
        (["--color", "always"], False, "1", True),
        (["--color", "never"], True, None, False),
    ],
)
def test_color_is_for_terminals_unless_asked_for(
    flags: list[str],
    is_terminal: bool,
    no_color: str | None,
    in_color: bool,
    told: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", str(told), *flags])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    inspect_data.main()
    text = output.getvalue()
    assert (f"{GREEN}yes{PLAIN}\n" in text) == in_color
    assert (" [[yes]]\n" in text) == (not in_color)
    assert (f"trained tokens are shown {GREEN}green{PLAIN}" in text) == in_color
    if in_color:
        assert text.count("\x1b") == 2 * text.count(GREEN), "none of the text's own"
        assert "Q: [[é]]?" in text, "needs no escape there"


def test_rows_are_counted_as_they_were_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2xla.data import row_inspection

    monkeypatch.setattr(row_inspection, "_ROWS_AT_ONCE", 7)
    samples = random_samples(200, longest=20, seed=3)
    write_rows(tmp_path, samples, load_tokenizer("bytes"), row_length=32, shard_size=100)
    stream, packed = TokenStream(tmp_path), list(pack(samples, 32, 256))
    found = count_rows(stream)
    assert found.length == 32
    assert found.conversations.tolist() == [row.samples for row in packed]
    assert found.trained == sum(int(s.trained.sum()) for s in samples)
    assert found.fill == 32 * len(packed) - sum(len(s.ids) + 1 for s in samples)
    rows = list(sample_rows(stream, 10**6))
    shown = [
        ([i for ids, _ in runs for i in ids], [t for ids, t in runs for _ in ids])
        for row in rows for runs in row.conversations()
    ]  # fmt: skip
    begun = [s.begun_with(256) for s in samples]
    assert sorted(shown) == sorted((s.ids.tolist(), s.trained.tolist()) for s in begun)
    for row in rows:
        for runs in row.conversations():
            assert [t for _, t in runs] == [bool(number % 2) for number in range(len(runs))], "runs take turns"


def test_rows_without_a_tokenizer_are_shown_as_ids(told: Path) -> None:
    for file in told.glob("tokenizer*"):
        file.unlink()
    text = succeed(run_here("scripts/inspect_data.py", told, "--rows", 1))
    assert re.search(r"    256 81 58 32 51 .* \[\[ 55 \]\]", text)
    assert "row 1" not in text


def test_a_manifest_that_promises_other_tokens_is_refused(told: Path) -> None:
    file = told / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"trained_tokens": manifest["trained_tokens"] + 1}))
    result = run_here("scripts/inspect_data.py", told)
    assert result.returncode == 2
    assert f"promises {manifest['trained_tokens'] + 1} trained tokens" in result.stderr
