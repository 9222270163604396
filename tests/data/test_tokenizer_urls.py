"""Tokenizers behind URLs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from gpt2xla.config.paths import check_tokenizer
from gpt2xla.data import tokenizer
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.errors import InputError, as_named


@pytest.fixture
def in_bucket(tmp_path: Path) -> Iterator[Path]:
    """The folder behind memory://bucket/tokenizer, with chat templates of both kinds."""
    folder = tmp_path / "tokenizer"
    load_tokenizer("bytes").save(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    (folder / "weights.bin").write_bytes(b"not fetched")
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/bucket/tokenizer", recursive=True)
    yield folder
    files.rm("/bucket", recursive=True)


def test_a_tokenizer_behind_a_url_is_that_of_the_folder_itself(in_bucket: Path, tmp_path: Path) -> None:
    here = load_tokenizer(str(in_bucket))
    for url in ("memory://bucket/tokenizer", "memory://bucket/tokenizer/", "memory://bucket/tokenizer/tokenizer.json"):
        there = load_tokenizer(url)
        assert (there.sha256, there.special_tokens, there.chat_template) == (
            here.sha256, here.special_tokens, "{{ messages[0] }}",
        )  # fmt: skip
        assert there.name == url
        there.save(tmp_path / "saved")
        assert (tmp_path / "saved" / "additional_chat_templates" / "short.jinja").read_text() == "{{ messages }}"
        assert not (tmp_path / "saved" / "weights.bin").exists()
    fsspec.filesystem("memory").copy("/bucket/tokenizer/tokenizer.json", "/bucket/other.json")
    assert load_tokenizer("memory://bucket/other.json").sha256 == here.sha256


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("memory://bucket/nothing", "no tokenizer is there; check the address, or name a folder with one"),
        ("memory://bucket/tokenizer/weights.bin", "memory://bucket/tokenizer/weights.bin is not a tokenizer.json"),
        ("mem://bucket", "there is no mem://"),
    ],
)
def test_what_is_no_tokenizer_behind_a_url_is_named(in_bucket: Path, url: str, problem: str) -> None:
    check_tokenizer("--tokenizer", url)
    with pytest.raises(InputError) as raised:
        load_tokenizer(url)
    assert problem in as_named(raised.value)


def test_a_model_that_is_named_by_mistake_is_not_fetched(in_bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_MOST_BYTES", 10)
    with pytest.raises(InputError, match=r"weights.bin has 0 MB, too many for a tokenizer\.json; name one"):
        load_tokenizer("memory://bucket/tokenizer/weights.bin")
