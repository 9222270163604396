"""Which tokens a step reads, against brute force."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2xla.data.shards import TokenStream
from gpt2xla.data.windows import TrainingOrder, Windows, permute, validation_batches
from gpt2xla.errors import InputError
from gpt2xla.loss import IGNORED_LABEL

LENGTH = 8  # seq_length


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """range(1003) over shards of odd sizes: 125 windows of 8, two tokens over."""
    folder = tmp_path_factory.mktemp("range")
    for number, part in enumerate(np.split(np.arange(1003, dtype=np.uint16), [1, 14, 15, 300, 777])):
        np.save(folder / f"{number}.npy", part)
    return Windows(TokenStream(folder), LENGTH, vocab_size=1003)


def order(windows: Windows, **changes) -> TrainingOrder:
    arguments = dict(batch_size=24, accum=1, rank=0, world_size=1, drop_last=False, shuffle_seed=None)
    return TrainingOrder(windows, **(arguments | changes))


@pytest.mark.parametrize("shuffle_seed", [None, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("accum", [1, 3])
def test_an_epoch_reads_each_window_once_and_alike_for_any_number_of_processes(
    windows: Windows, world_size: int, accum: int, shuffle_seed: int | None
) -> None:
    alone = order(windows, accum=accum, shuffle_seed=shuffle_seed)
    shares = [
        order(windows, accum=accum, shuffle_seed=shuffle_seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen: list[int] = []
    for micro_step in range(11 * accum):
        expected = alone.window_ids(micro_step)
        together = np.concatenate([share.window_ids(micro_step) for share in shares])
        assert (together == expected).all()
        seen += expected.tolist()
    for epoch in range(len(seen) // 125):
        assert sorted(seen[epoch * 125 : (epoch + 1) * 125]) == list(range(125))
    if shuffle_seed is None:
        assert seen == [n % 125 for n in range(len(seen))]
    else:
        assert seen[:125] != sorted(seen[:125])


def test_tokens_are_those_of_the_window_and_labels_the_next_ones(windows: Windows) -> None:
    batch = windows.batch(np.array([0, 1, 124, 60]))
    for row, window in enumerate((0, 1, 124, 60)):
        assert batch.input_ids[row].tolist() == list(range(window * LENGTH, window * LENGTH + LENGTH))
        assert batch.labels[row].tolist() == list(range(window * LENGTH + 1, window * LENGTH + LENGTH + 1))


def test_resuming_reads_on_where_the_run_stopped(windows: Windows) -> None:
    unbroken = order(windows, accum=3, shuffle_seed=1).batches(first_step=0)
    for _ in range(7 * 3):
        next(unbroken)
    resumed = order(windows, accum=3, shuffle_seed=1).batches(first_step=7)
    for _ in range(20):
        assert (next(resumed).input_ids == next(unbroken).input_ids).all()


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_drop_last_ends_epochs_at_whole_batches(windows: Windows, shuffle_seed: int | None) -> None:
    dropping = order(windows, drop_last=True, shuffle_seed=shuffle_seed)
    assert dropping.windows_per_epoch == 120
    epoch = np.concatenate([dropping.window_ids(step) for step in range(5)])
    assert len(set(epoch.tolist())) == 120
    if shuffle_seed is None:
        assert (dropping.window_ids(5) == np.arange(24)).all()


def test_each_epoch_is_shuffled_anew_and_by_the_seed(windows: Windows) -> None:
    def first_windows(seed: int, epoch: int) -> list[int]:
        return [permute(i, 125, f"{seed}/{epoch}") for i in range(125)]

    assert first_windows(1, 0) != first_windows(1, 1)
    assert first_windows(1, 0) != first_windows(2, 0)
    assert first_windows(1, 0) == first_windows(1, 0)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 400), key=st.text(max_size=5))
def test_permute_is_a_permutation(size: int, key: str) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_spreads_evenly() -> None:
    """Position i lands on value j about equally often over many keys: chi-squared far below absurd."""
    size, keys = 10, 2000
    counts = np.zeros((size, size))
    for key in range(keys):
        for i in range(size):
            counts[i, permute(i, size, str(key))] += 1
    expected = keys / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 81 + 6 * (2 * 81) ** 0.5  # mean plus six standard deviations at 81 degrees of freedom


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 5, 11, 1000])
def test_validation_counts_each_window_once(windows: Windows, world_size: int, steps: int) -> None:
    labels: list[int] = []
    for rank in range(world_size):
        for batch in validation_batches(windows, 12, steps, rank, world_size):
            assert batch.labels.shape == (12 // world_size, LENGTH), "one shape, whatever is left"
            labels += [label for label in batch.labels.flatten().tolist() if label != IGNORED_LABEL]
    assert sorted(labels) == list(range(1, 1 + LENGTH * min(12 * steps, 125)))


def test_what_cannot_be_cut_into_batches_is_refused(windows: Windows, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="--train-batch-size 24 does not divide over 5 devices; use a multiple of 5, such as 25"
    ):
        order(windows, world_size=5)
    with pytest.raises(InputError, match="--drop-last leaves nothing"):
        order(windows, drop_last=True, batch_size=200)
    np.save(tmp_path / "0.npy", np.zeros(LENGTH, dtype=np.uint16))
    with pytest.raises(InputError, match="too few for one window"):
        Windows(TokenStream(tmp_path), LENGTH, vocab_size=10)


def test_an_id_that_only_a_read_finds_is_named_with_its_shard(tmp_path: Path) -> None:
    tokens = np.zeros(3_000_000, dtype=np.uint16)
    tokens[1_234_567] = 999  # between the sampled places
    np.save(tmp_path / "0.npy", tokens[:1_000_000])
    np.save(tmp_path / "1.npy", tokens[1_000_000:])
    windows = Windows(TokenStream(tmp_path), LENGTH, vocab_size=50)
    with pytest.raises(InputError, match=r"1\.npy: id 999"):
        windows.batch(np.array([0, 1_234_567 // LENGTH]))
    (tmp_path / "signed").mkdir()
    np.save(tmp_path / "signed" / "0.npy", np.full(100, -1, dtype=np.int32))
    with pytest.raises(InputError, match=r"0\.npy: id -1"):
        Windows(TokenStream(tmp_path / "signed"), LENGTH, vocab_size=50).batch(np.array([0]))
