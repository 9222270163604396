"""Masked rows: packed without a loss, written, and read as the batches that training sees."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare_documents, random_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2xla.data.preparation import rows
from gpt2xla.data.preparation.rows import Sample, pack, write_rows
from gpt2xla.data.shards import MANIFEST, Manifest, TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.data.windows import Windows
from gpt2xla.errors import InputError
from gpt2xla.model.loss import IGNORED_LABEL

EOT = 256  # of the tokenizer `bytes`


def written(folder: Path, row_length: int = 13, shard_size: int = 101, seed: int = 0) -> list[Sample]:
    samples = random_samples(60, longest=12, seed=seed)
    write_rows(
        folder, samples, load_tokenizer("bytes"), row_length=row_length, shard_size=shard_size, chat_template="{{ x }}"
    )
    return samples


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=60), open_rows=st.integers(1, 5), has_start=st.booleans())
def test_each_sample_stands_whole_in_one_row(lengths: list[int], open_rows: int, has_start: bool) -> None:
    samples = []
    for number, length in enumerate(lengths):
        ids = np.arange(length) + 100 * number + 1  # unique, so a sample is known wherever it stands
        trained = np.arange(length) % 2 == 0
        if has_start:
            ids, trained = np.array([0, *ids]), np.array([False, *trained])
        samples.append(Sample(ids.astype(np.uint32), trained, length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_OPEN_ROWS", open_rows)
        packed = list(pack(samples, 21, 0))
    assert [row.ids.tolist() for row in packed] == [row.ids.tolist() for row in _packed_again(samples, open_rows)]
    found: Counter[tuple] = Counter()
    for ids, trained, count, size in packed:
        assert len(ids) == len(trained) == 21
        starts = [*np.flatnonzero(ids == 0), 21]
        parts = [(tuple(ids[a:b].tolist()), tuple(trained[a:b].tolist())) for a, b in itertools.pairwise(starts)]
        whole = [part for part in parts if part != ((0,), (False,))]  # else padding
        assert parts == whole + [((0,), (False,))] * (len(parts) - len(whole))  # which comes last
        assert len(whole) == count
        assert sum(len(ids) - 1 for ids, _ in whole) == size
        found.update(whole)
    begun = [sample.begun_with(0) for sample in samples]
    assert found == Counter((tuple(s.ids.tolist()), tuple(s.trained.tolist())) for s in begun)


def _packed_again(samples: list[Sample], open_rows: int) -> list[rows.Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_OPEN_ROWS", open_rows)
        return list(pack(iter(samples), 21, 0))


def test_packing_wastes_little_and_holds_few_rows() -> None:
    """Of a million tokens. A generator shows how far packing has read when a row comes out."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.8, 8000), 2, 512).astype(int)
    read = 0

    def samples():
        nonlocal read
        for length in lengths:
            read += int(length)
            yield Sample(np.zeros(length, np.uint16), np.arange(length) > 0, 0)

    out, held = 0, []
    for _row in pack(samples(), 512, 0):
        out += 1
        held.append(read - 512 * out)
    assert max(held) < rows._OPEN_ROWS * 512
    assert lengths.sum() / (512 * out) > 0.99


def test_windows_are_rows_whose_labels_are_what_the_masks_select(tmp_path: Path) -> None:
    """13 tokens a row, 101 a shard: no border of a row, shard or byte of the mask is that of another."""
    samples = written(tmp_path / "rows")
    stream = TokenStream(tmp_path / "rows")
    manifest = stream.manifest
    assert manifest is not None
    assert len(manifest.shards) > 3
    assert (manifest.row_length, manifest.chat_template) == (13, "{{ x }}")
    assert manifest.trained_tokens == sum(int(s.trained.sum()) for s in samples)
    assert (manifest.documents, manifest.bytes) == (60, sum(s.size for s in samples))
    windows = Windows(stream, 13, 257)
    packed = list(pack(samples, 13, EOT))
    assert (windows.count, windows.rest) == (len(packed), 0)
    trained = stream.trained(0, stream.length)
    tokens = stream.read(0, stream.length)
    assert (tokens == np.concatenate([*(row.ids for row in packed), [EOT]])).all()
    assert (trained == np.concatenate([*(row.trained for row in packed), [False]])).all()
    shuffled = np.random.default_rng(0).permutation(windows.count)
    for chosen in (range(windows.count), range(3, 7), shuffled, np.array([4, -1, 2])):
        inputs, labels = windows.batch(chosen)
        for window, row, label in zip(list(chosen), inputs.numpy(), labels.numpy(), strict=True):
            if window < 0:
                assert (label == IGNORED_LABEL).all()
                continue
            ids, mask = packed[window].ids, packed[window].trained
            assert (row == ids).all()
            assert (label[:-1] == np.where(mask[1:], ids[1:].astype(int), IGNORED_LABEL)).all()
            assert label[-1] == IGNORED_LABEL
        if (np.asarray(chosen) >= 0).all():
            assert windows.trained_tokens(chosen) == int((labels != IGNORED_LABEL).sum())


def test_a_manifest_of_plain_text_is_as_it_was_and_masked_ones_add_keys(tmp_path: Path) -> None:
    folder = prepare_documents(tmp_path / "plain") / "train"
    keys = ["tokenizer", "tokenizer_sha256", "vocab_size", "eot_id", "dtype", "tokens", "documents", "bytes", "shards"]
    text = (folder / MANIFEST).read_text()
    values = json.loads(text)
    assert list(values) == keys
    assert list(values["shards"][0]) == ["file", "tokens", "sha256"]
    assert text == json.dumps(values, indent=2) + "\n"
    record = json.loads((folder.parent / "preparation.json").read_text())
    assert list(record["splits"]["train"]["shards"][0]) == ["file", "tokens", "sha256"]
    written(tmp_path / "rows")
    values = json.loads((tmp_path / "rows" / MANIFEST).read_text())
    assert list(values) == [*keys, "row_length", "trained_tokens", "chat_template"]
    assert list(values["shards"][0]) == ["file", "tokens", "sha256", "mask_sha256"]
    loaded = Manifest.load(tmp_path / "rows")
    assert loaded is not None
    loaded.save(tmp_path)
    assert (tmp_path / MANIFEST).read_text() == (tmp_path / "rows" / MANIFEST).read_text()


def changed(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / MANIFEST).read_text()) | values
        (folder / MANIFEST).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return change


def without_one_hash(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    del values["shards"][1]["mask_sha256"]
    (folder / MANIFEST).write_text(json.dumps(values))


def masks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.mask"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: masks(f)[1].unlink(), "shard_000001.mask, the mask of a shard, is missing although manifest.json"),
        (
            lambda f: masks(f)[1].write_bytes(b"1234"),
            "shard_000001.mask holds 4 bytes, but the mask of 101 tokens has 13",
        ),
        (lambda f: masks(f)[1].write_bytes(b""), "shard_000001.mask holds 0 bytes"),
        (lambda f: shutil.copy(masks(f)[1], f / "other.mask"), "other.mask is not named in manifest.json"),
        (lambda f: (f / MANIFEST).unlink(), "shard_000000.mask is a shard's mask, which cannot be read without"),
        (changed(row_length=None), "of row_length, trained_tokens and each shard's mask_sha256 some are missing"),
        (changed(trained_tokens=None), "of row_length, trained_tokens and each shard's mask_sha256 some are missing"),
        (without_one_hash, "of row_length, trained_tokens and each shard's mask_sha256 some are missing"),
        (changed(row_length=11), "tokens are not rows of row_length 11 and one more"),
        (changed(row_length="13"), "row_length is '13'"),
        (changed(trained_tokens=0), "trained_tokens is 0, of"),
        (changed(chat_template=3), "chat_template is 3"),
    ],
)
def test_damage_is_one_line_that_names_the_file(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    written(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        TokenStream(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found_by_its_hash(tmp_path: Path) -> None:
    written(tmp_path)
    TokenStream(tmp_path).verify()
    file = masks(tmp_path)[2]
    content = bytearray(file.read_bytes())
    content[3] ^= 4
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"shard_000002\.mask is not what manifest\.json says"):
        TokenStream(tmp_path).verify()


def test_the_fingerprint_is_that_of_tokens_and_masks(tmp_path: Path) -> None:
    samples = written(tmp_path / "a")
    turned = [
        Sample(s.ids, ~s.trained & (np.arange(len(s.ids)) > 0) | (np.arange(len(s.ids)) == 1), s.size) for s in samples
    ]
    write_rows(tmp_path / "b", turned, load_tokenizer("bytes"), row_length=13, shard_size=101)
    a, b = TokenStream(tmp_path / "a"), TokenStream(tmp_path / "b")
    assert (a.read(0, a.length) == b.read(0, b.length)).all()
    assert a.fingerprint != b.fingerprint


def test_rows_need_their_own_seq_length_samples_and_an_end_of_text(tmp_path: Path) -> None:
    written(tmp_path / "rows")
    with pytest.raises(InputError, match=r"--seq-length 16: --train-dir .* rows of 13 tokens; use --seq-length 13"):
        Windows(TokenStream(tmp_path / "rows"), 16, 257)
    with pytest.raises(InputError, match="nothing to write"):
        write_rows(tmp_path / "none", [], load_tokenizer("bytes"), row_length=13, shard_size=100)
