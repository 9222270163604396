"""Every format read as the same stream; every damage named by file."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpt2xla.data.corpus import local_parts
from gpt2xla.data.prepare import PrepareConfig, prepare
from gpt2xla.data.shards import MANIFEST, Manifest, TokenStream
from gpt2xla.data.windows import Windows
from gpt2xla.errors import InputError
from gpt2xla.tokenizer import load_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 50_000, 10_007)


def write_npy(folder: Path, dtype: type = np.uint16) -> None:
    for number, part in enumerate(
        np.split(TOKENS.astype(dtype), [1, 17, 5000, 5000])
    ):  # one empty, one of a single token
        np.save(folder / f"{number:02d}.npy", part)


def write_llmc(folder: Path) -> None:
    for number, part in enumerate(np.split(TOKENS.astype("<u2"), [4000])):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(part)
        (folder / f"{number:02d}.bin").write_bytes(header.tobytes() + part.tobytes())


def write_nanogpt(folder: Path) -> None:
    (folder / "train.bin").write_bytes(TOKENS.astype("<u2").tobytes())


@pytest.mark.parametrize(
    "write",
    [
        write_npy,
        lambda folder: write_npy(folder, np.uint32),
        lambda folder: write_npy(folder, np.int64),
        write_llmc,
        write_nanogpt,
    ],
    ids=["npy", "npy uint32", "npy int64", "llm.c", "nanoGPT"],
)
def test_all_formats_are_one_stream(write, tmp_path: Path) -> None:
    write(tmp_path)
    stream = TokenStream(tmp_path)
    assert stream.length == len(TOKENS)
    assert (stream.read(0, stream.length) == TOKENS).all()
    rng = np.random.default_rng(1)
    for start in [0, 1, 16, 17, 4999, 5000, *rng.integers(0, 10_000, 50)]:
        count = int(rng.integers(0, min(6000, stream.length - start) + 1))
        part = stream.read(int(start), count)
        assert (part == TOKENS[start : start + count]).all()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    text = tmp_path / "documents.txt"
    text.write_text("\n".join(f"document {i} " * 20 for i in range(60)))
    config = PrepareConfig(output_dir=str(tmp_path), seed=0, test_fraction=0.2, shard_size=2000)
    prepare(local_parts([text], split_by="line"), load_tokenizer("bytes"), config)
    return tmp_path / "train"


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("*.npy"))[1]


def cut(folder: Path) -> Path:
    file = shard_of(folder)
    file.write_bytes(file.read_bytes()[:-7])
    return file


def shorten(folder: Path) -> Path:
    file = shard_of(folder)
    np.save(file, np.load(file)[:-1])
    return file


def widen(folder: Path) -> Path:
    file = shard_of(folder)
    np.save(file, np.load(file).astype(np.uint32))
    return file


def remove(folder: Path) -> Path:
    file = shard_of(folder)
    file.unlink()
    return file


def make_float(folder: Path) -> Path:
    file = shard_of(folder)
    np.save(file, np.load(file).astype(np.float32))
    return file


def pickle(folder: Path) -> Path:
    file = shard_of(folder)
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file


def spoil_manifest(folder: Path) -> Path:
    file = folder / MANIFEST
    file.write_text('{"shards": [{"file": 1}]}')
    return file


def point_outside(folder: Path) -> Path:
    file = folder / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["shards"][0]["file"] = "../test/shard_000000.npy"
    file.write_text(json.dumps(manifest))
    return file


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": "many"}, {"dtype": "banana"}, {"tokens": None}, {"shards": [{"file": 7, "tokens": 1, "sha256": ""}]},
        {"shards": [{"file": "x.npy", "tokens": "1", "sha256": ""}]}, {"surprise": 1},
    ],
)  # fmt: skip
def test_a_manifest_of_wrong_types_is_refused(change: dict, prepared: Path) -> None:
    file = prepared / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=r"manifest\.json is not a manifest"):
        TokenStream(prepared)


def test_an_empty_shard_is_no_data(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros(0, dtype=np.uint16))
    with pytest.raises(InputError, match="holds 0 tokens, too few"):
        Windows(TokenStream(tmp_path), 16, vocab_size=97)


def add_tokens_to_manifest(folder: Path) -> Path:
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokens": 5}))
    return file


@pytest.mark.parametrize(
    "damage", [add_tokens_to_manifest, cut, shorten, widen, remove, make_float, pickle, spoil_manifest, point_outside]
)
def test_damage_is_named_by_file(damage, prepared: Path) -> None:
    file = damage(prepared)
    with pytest.raises(InputError) as error:
        TokenStream(prepared)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_with_both_splits_gives_each_option_its_own(tmp_path: Path) -> None:
    for name, value in (("train.bin", 1), ("val.bin", 2)):
        (tmp_path / name).write_bytes(np.full(100, value, dtype="<u2").tobytes())
    assert TokenStream(tmp_path, "--train-dir").read(0, 100).tolist() == [1] * 100
    assert TokenStream(tmp_path, "--valid-dir").read(0, 100).tolist() == [2] * 100


def test_bin_files_that_lie_are_refused(tmp_path: Path) -> None:
    write_llmc(tmp_path)
    file = tmp_path / "01.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"01\.bin.*promises 6007 tokens but 6006 follow"):
        TokenStream(tmp_path)
    file.write_bytes(b"abc")
    with pytest.raises(InputError, match=r"01\.bin"):
        TokenStream(tmp_path)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, prepared: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    write_npy(folder)
    TokenStream(folder).check_ids(50_000)
    with pytest.raises(InputError, match="--vocab-size 40000 is too small"):
        TokenStream(folder).check_ids(40_000)
    TokenStream(prepared).check_ids(257)
    with pytest.raises(InputError, match="use at least 257"):
        TokenStream(prepared).check_ids(256)


def test_an_id_that_the_manifest_rules_out_is_found_by_sampling(prepared: Path) -> None:
    file = shard_of(prepared)
    np.save(file, np.full(2000, 300, dtype=np.uint16))
    with pytest.raises(InputError, match=rf"{file} holds id 300, but manifest.json says that ids lie below 257"):
        TokenStream(prepared).check_ids(50_000)


def test_verifying_finds_a_flipped_bit_and_names_the_shard(prepared: Path) -> None:
    TokenStream(prepared).verify()
    file = shard_of(prepared)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    stream = TokenStream(prepared)
    stream.check_ids(257)
    with pytest.raises(InputError, match=rf"{file} is not what manifest.json says"):
        stream.verify()


def test_verifying_needs_a_manifest(tmp_path: Path) -> None:
    write_npy(tmp_path)
    with pytest.raises(InputError, match=r"--verify-data: .* has no manifest\.json"):
        TokenStream(tmp_path).verify()


def test_the_fingerprint_follows_the_tokens(prepared: Path) -> None:
    before = TokenStream(prepared).fingerprint
    assert TokenStream(prepared).fingerprint == before
    manifest = Manifest.load(prepared)
    assert manifest is not None
    file = prepared / MANIFEST
    file.write_text(file.read_text().replace(manifest.shards[0].sha256, "0" * 64))
    assert TokenStream(prepared).fingerprint != before
