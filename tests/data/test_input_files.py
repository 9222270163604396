"""Which files a preparation takes: each once, none that is hidden, and of saved datasets those that `datasets` loads."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from conftest import run_here, succeed

from gpt2xla.data.documents.corpus import documents_of, local_parts
from gpt2xla.data.preparation.hub import HubConfig, dataset_parts
from gpt2xla.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """d/a.txt, d/c.txt, d/sub/b.txt, and what nobody wants to train on."""
    for name in (
        "a.txt",
        "sub/b.txt",
        "c.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        ".git/x.txt",
        ".hidden.txt",
        "x.py",
        "y.png",
    ):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(Path(name).stem)
    return tmp_path / "d"


def read(*paths: object, said: list[str] | None = None, **options: object) -> list[str]:
    say = said.append if said is not None else (lambda _: None)
    return list(documents_of(local_parts(paths, say=say, **options)))  # type: ignore[arg-type]


def test_each_file_is_taken_once_and_hidden_ones_are_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    said: list[str] = []
    assert read("d", "d/a.txt", "./d/sub", said=said) == ["a", "c", "b"]
    assert said == [
        "left out: 3 hidden (.git, .hidden.txt, .ipynb_checkpoints), 2 of other kinds (.py, .png), 2 reached twice "
        "(d/a.txt, d/sub/b.txt)"
    ]
    assert read("d/.hidden.txt", "d/.git") == [".hidden", "x"], "named, they are taken"


def test_links_to_a_file_are_that_file(folder: Path) -> None:
    """As the hub's cache has them: two snapshots whose files are links to the same blob."""
    for snapshot in ("1", "2"):
        (folder / snapshot).mkdir()
        (folder / snapshot / "a.jsonl").symlink_to(folder / "blob")
    (folder / "blob").write_text('{"text": "a"}')
    (folder / "sub" / "back").symlink_to(folder)
    (folder / "sub" / "hard.txt").hardlink_to(folder / "sub" / "b.txt")
    assert read(folder / "1", folder / "2", folder / "sub") == ["a", "b", "a", "c"], "what is new behind the link back"


def test_what_may_be_the_same_text_twice_is_refused(folder: Path) -> None:
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    with pytest.raises(InputError, match=r"a\.txt and a\.txt\.gz may be the same text"):
        read(folder)
    assert read(folder, exclude=("*.gz",)) == ["a", "c", "b"]
    for name in ("blobs", "snapshots/1", "snapshots/2"):  # a whole cache of the hub, with two revisions
        (folder / "data" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="snapshots holds 2 revisions of the same files"):
        read(folder, exclude=("*.gz",))


SPLITS = {"README.md": "# A data set", "data/train-0.jsonl": "a", "data/test-0.jsonl": "b"}
CONFIGS = {
    "README.md": "---\nconfigs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files: de/*\n---\n",
    "en/a.jsonl": "a",
    "de/b.jsonl": "b",
}


@pytest.mark.parametrize(("files", "options", "expected"), [
    (SPLITS, {}, {"a": None}), (SPLITS, {"split": "test"}, {"b": None}),
    (SPLITS, {"test_split": "test"}, {"a": "train", "b": "test"}),
    (SPLITS, {"split": "dev"}, "no split 'dev' but train, test"),
    ({"README.md": "# Card", "a.jsonl": "a", "b.jsonl": "b"}, {}, {"a": None, "b": None}),
    (CONFIGS, {"config": "de"}, {"b": None}), (CONFIGS, {}, "Please pick one among the available configs"),
    ({"README.md": CONFIGS["README.md"]}, {"config": "de"}, "choose with --config"),
])  # fmt: skip
def test_a_folder_has_the_splits_that_datasets_finds_in_it(
    files: dict[str, str],
    options: dict[str, str],
    expected: dict[str, str | None] | str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "csv"  # a builder of datasets has that name, too
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text if name == "README.md" else json.dumps({"text": text}))
    monkeypatch.chdir(tmp_path)
    config = HubConfig(dataset="csv", **options)  # type: ignore[arg-type]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            dataset_parts(config, say=lambda _: None)
    else:
        parts = dataset_parts(config, say=lambda _: None)
        assert {text: part.split for part in parts for text in documents_of([part])} == expected


@pytest.mark.parametrize(("exclude", "expected"), [
    (["a.txt"], ["c", "b"]), (["[ab].txt"], ["c"]), (["sub"], ["a", "c"]), (["sub/*"], ["a", "c"]), (["./sub/"], ["a", "c"]),
    (["**/[ab].txt"], ["c"]),
    (["*.bak", "sub/b.*"], ["a", "c"]),
])  # fmt: skip
def test_exclude_takes_patterns(exclude: list[str], expected: list[str], folder: Path) -> None:
    said: list[str] = []
    assert read(folder, exclude=tuple(exclude), said=said) == expected
    assert [line for line in said if "matches" in line] == ["note: --exclude *.bak matches nothing"] * (
        "*.bak" in exclude
    )


def test_what_is_there_instead_is_named(folder: Path) -> None:
    (folder / "x.json.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    assert read(folder) == ["a", "c", "x", "b"]
    with pytest.raises(
        InputError, match=r"no files ending in \.rst; there are 3 hidden .*, 6 of other kinds \(\.txt, \.json\.gz"
    ):
        read(folder, suffixes=(".rst",))
    with pytest.raises(InputError, match=r"/nothing: no such file or folder"):
        read(folder / "nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "sub").chmod(0)
    with pytest.raises(InputError, match="make it readable, or leave it out"):
        read(folder)


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    flags = ["--tokenizer", "bytes", "--output-dir"]
    succeed(run_here("scripts/prepare_text.py", "--input", "~/d/a.txt", "~/d/sub", *flags, "~/out"))
    succeed(run_here("scripts/prepare_dataset.py", "--dataset", "~/d", *flags, "~/more"))
    assert all((folder.parent / name / "train" / "manifest.json").exists() for name in ("out", "more"))


def save(texts: list[str], folder: Path, shards: int = 1) -> None:
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder, num_shards=shards)


def test_of_a_saved_dataset_the_files_that_its_list_names_are_read(tmp_path: Path) -> None:
    texts, said = [f"text {n}" for n in range(10)], []
    save([*texts, "stale"], tmp_path / "d", shards=3)
    save(texts, tmp_path / "d", shards=2)
    assert len(list((tmp_path / "d").glob("*.arrow"))) == 5
    expected = datasets.load_from_disk(str(tmp_path / "d"))["text"][:]
    assert read(tmp_path / "d", said=said) == expected == texts
    assert said[0].startswith("left out: 3 stale, since state.json does not name them (data-00000-of-00003.arrow, ")
    assert read(tmp_path, said=said) == texts, "below the folder given, too"
    assert read(tmp_path, exclude=("d/data-00001*",)) == texts[:5]

    state = json.loads((tmp_path / "d" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "d" / "state.json").write_text(json.dumps(state))
    assert read(tmp_path / "d") == datasets.load_from_disk(str(tmp_path / "d"))["text"][:] == texts[5:] + texts[:5]


@pytest.mark.parametrize(("change", "words"), [
    ({"_data_files": [{"filename": "gone.arrow"}]}, "lacks gone.arrow, although state.json names it"),
    ({"_data_files": [{"filename": "../x.arrow"}]}, "names no data files"), ({"_data_files": None}, "names no data files"),
    ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "save flatten_indices() of it"),
])  # fmt: skip
def test_a_saved_dataset_that_is_not_whole_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    save(["text"], tmp_path / "d")
    file = tmp_path / "d" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as raised:
        read(tmp_path / "d")
    assert words in str(raised.value)


def test_old_saved_datasets_and_caches_of_datasets(tmp_path: Path) -> None:
    """One dataset.arrow, as version 1 saved it; and a builder's cache, with what map() left beside it."""
    save(["one", "two"], tmp_path / "old")
    (tmp_path / "old" / "data-00000-of-00001.arrow").rename(tmp_path / "old" / "dataset.arrow")
    file = tmp_path / "old" / "state.json"
    nothing = {"_data_files": [{"filename": "dataset.arrow"}], "_indices_data_files": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | nothing))
    assert read(tmp_path / "old") == ["one", "two"]
    (tmp_path / "old" / "state.json").unlink()
    (tmp_path / "old" / "dataset.arrow").rename(tmp_path / "old" / "json-train.arrow")
    mapped = datasets.Dataset.from_file(str(tmp_path / "old" / "json-train.arrow")).map(
        lambda row: {"text": row["text"] * 2}
    )
    assert (cache := list((tmp_path / "old").glob("cache-*.arrow")))
    assert len(mapped) == 2
    said: list[str] = []
    assert read(tmp_path / "old", said=said) == ["one", "two"]
    assert said == [f"left out: 2 of what `datasets` keeps beside its data ({cache[0].name}, dataset_info.json)"]


def test_of_several_splits_one_is_taken_and_the_others_named(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    said: list[str] = []
    assert read(tmp_path / "d", said=said) == ["train"]
    assert said == ["left out: 1 of other splits (validation)"]
    parts = dataset_parts(HubConfig(dataset=str(tmp_path / "d"), split="validation"), said.append)
    assert list(documents_of(parts)) == ["validation"]
    with pytest.raises(InputError, match="has no split 'test' but train, validation"):
        dataset_parts(HubConfig(dataset=str(tmp_path / "d"), split="test"))
    (tmp_path / "d" / "train" / "state.json").unlink()
    with pytest.raises(InputError, match="lacks train/ or a part of it"):
        read(tmp_path / "d")


def test_a_folder_of_json_objects(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"text": name, "n": 1}, indent=2))
    assert read(tmp_path) == ["a", "b"]
