"""Which tokens a step reads, against brute force."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2xla.data.batch_plan import BatchPlan, Phase
from gpt2xla.data.mixture import Mixture
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.windows import Batch, TrainingOrder, Windows, validation_batches
from gpt2xla.errors import InputError
from gpt2xla.model.loss import IGNORED_LABEL

LENGTH = 8  # seq_length


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """range(1003) over shards of odd sizes: 125 windows of 8, two tokens over."""
    folder = tmp_path_factory.mktemp("range")
    for number, part in enumerate(np.split(np.arange(1003, dtype=np.uint32), [1, 14, 15, 300, 777])):
        np.save(folder / f"{number}.npy", part)
    return Windows(TokenStream(folder), LENGTH, vocab_size=1003)


def order(windows: Windows, **changes) -> TrainingOrder:
    plan = BatchPlan((Phase(0, changes.pop("batch_size", 24), changes.pop("accum", 1)),))
    arguments = dict(rank=0, world_size=1, drop_last=False, shuffle_seed=None)
    return TrainingOrder([windows], Mixture.of([1.0]), plan, **(arguments | changes))


@settings(max_examples=60, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 3, 8]),
    share=st.integers(1, 9),
    accum=st.integers(1, 4),
    shuffle_seed=st.sampled_from([None, 7]),
    drop_last=st.booleans(),
    first_step=st.integers(0, 12),
)
def test_an_epoch_reads_each_window_once_and_alike_for_any_number_of_processes(
    windows: Windows,
    world_size: int,
    share: int,
    accum: int,
    shuffle_seed: int | None,
    drop_last: bool,
    first_step: int,
) -> None:
    """Tokens are 0, 1, 2, ...: what comes out says where it came from."""
    changes = dict(batch_size=share * world_size, accum=accum, shuffle_seed=shuffle_seed, drop_last=drop_last)
    per_epoch = 125 - (125 % (share * world_size) if drop_last else 0)
    shares = [
        order(windows, **changes, rank=rank, world_size=world_size).batches(first_step) for rank in range(world_size)
    ]
    number, seen = first_step * accum * share * world_size, {}
    for _ in range(-(-2 * per_epoch // (share * world_size)) + 1):
        for batch in (next(part) for part in shares):
            assert batch.input_ids.shape == batch.labels.shape == (share, LENGTH)
            for inputs, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
                assert inputs == list(range(inputs[0], inputs[0] + LENGTH))
                assert labels == list(range(inputs[0] + 1, inputs[0] + LENGTH + 1))
                seen[number] = inputs[0] // LENGTH
                number += 1
    whole_epochs = [e for e in range(100) if e * per_epoch in seen and (e + 1) * per_epoch - 1 in seen]
    assert whole_epochs
    for epoch in whole_epochs:
        read = [seen[epoch * per_epoch + position] for position in range(per_epoch)]
        assert len(set(read)) == per_epoch
        assert drop_last or sorted(read) == list(range(125))
        assert (read == sorted(read)) == (shuffle_seed is None)
    alone = order(windows, **changes).batches(first_step)
    assert seen == dict(enumerate_windows(alone, first_step * accum * share * world_size, len(seen)))


def enumerate_windows(batches: Iterator[Batch], first: int, count: int) -> Iterator[tuple[int, int]]:
    windows = (ids[0] // LENGTH for batch in batches for ids in batch.input_ids.tolist())
    return zip(range(first, first + count), windows, strict=False)


def windows_of(batch: Batch) -> list[int]:
    return (batch.input_ids[:, 0] // LENGTH).tolist()


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_step_one_million_costs_what_step_one_costs(tmp_path: Path, shuffle_seed: int | None) -> None:
    class CountingStream(TokenStream):
        reads = tokens = 0

        def read(self, start: int, count: int) -> np.ndarray:
            self.reads += 1
            self.tokens += count
            return super().read(start, count)

    for number in range(5):
        np.save(tmp_path / f"{number}.npy", np.zeros(1001, dtype=np.uint16))
    stream = CountingStream(tmp_path)
    reading = order(Windows(stream, LENGTH, vocab_size=1), shuffle_seed=shuffle_seed, accum=4)
    costs = []
    for step in (1, 1_000_000, 10**12):
        stream.reads = stream.tokens = 0
        batches = reading.batches(step)
        for _ in range(4):
            next(batches)
        costs.append((stream.reads, stream.tokens))
    most = (4 * 24, 4 * 24 * (LENGTH + 1))
    assert all(cost <= most for cost in costs), costs  # at an epoch's end a run is read row by row
    if shuffle_seed is not None:
        assert costs == [most] * 3


@pytest.mark.parametrize("apart", [True, False])
def test_tokens_are_those_of_the_window_and_labels_the_next_ones(windows: Windows, apart: bool) -> None:
    chosen = np.array([0, 1, 124, 60]) if apart else range(57, 61)
    batch = windows.batch(chosen)
    for row, window in enumerate(chosen):
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
def test_a_steps_windows_are_described_as_all_its_processes_read_them(
    windows: Windows, shuffle_seed: int | None
) -> None:
    steps = [order(windows, accum=2, rank=rank, world_size=3, shuffle_seed=shuffle_seed) for rank in range(3)]
    for step in (0, 1, 2, 5):
        told = steps[0].describe(step)
        assert told.endswith(f" of {windows.stream.name}")
        numbers = [int(number) for number in re.findall(r"\d+", told.removesuffix(windows.stream.name))]
        if " to " in told:
            numbers = list(range(numbers[0], numbers[1] + 1))
        read = [w for part in steps for batch in itertools.islice(part.batches(step), 2) for w in windows_of(batch)]
        assert sorted(numbers) == sorted(read)


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_drop_last_ends_epochs_at_whole_batches(windows: Windows, shuffle_seed: int | None) -> None:
    dropping = order(windows, drop_last=True, shuffle_seed=shuffle_seed)
    epoch = [window for step in range(5) for window in windows_of(dropping.batch(step))]
    assert len(set(epoch)) == 120
    if shuffle_seed is None:
        assert windows_of(dropping.batch(5)) == list(range(24))


def test_each_epoch_is_shuffled_again_and_by_the_seed(windows: Windows) -> None:
    def first_windows(seed: int, epoch: int) -> list[int]:
        whole_epochs = order(windows, batch_size=125, shuffle_seed=seed)
        return windows_of(whole_epochs.batch(epoch))

    assert sorted(first_windows(1, 0)) == list(range(125))
    assert first_windows(1, 0) != first_windows(1, 1)
    assert first_windows(1, 0) != first_windows(2, 0)
    assert first_windows(1, 0) == first_windows(1, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 5, 11, 1000])
def test_validation_counts_each_window_once(windows: Windows, world_size: int, steps: int) -> None:
    labels: list[int] = []
    for rank in range(world_size):
        for batch in validation_batches(windows, 12, steps, rank, world_size, world_size):
            assert batch.labels.shape == (12 // world_size, LENGTH), "one shape, whatever is left"
            labels += [label for label in batch.labels.flatten().tolist() if label != IGNORED_LABEL]
    assert sorted(labels) == list(range(1, 1 + LENGTH * min(12 * steps, 125)))


@pytest.mark.parametrize("length", [8, 10, 250, 501])
@pytest.mark.parametrize(("world_size", "devices"), [(1, 1), (2, 2), (3, 3), (1, 8), (2, 8)])
def test_validation_on_all_counts_each_token_once(windows: Windows, length: int, world_size: int, devices: int) -> None:
    """Also where neither windows nor batches divide: 1,002 tokens to predict are whole windows of 501 alone."""
    windows = Windows(windows.stream, length, vocab_size=1003)
    labels: list[int] = []
    batches = [list(validation_batches(windows, 12, "all", rank, world_size, devices)) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in batches}) == 1
    for batch in (batch for of_rank in batches for batch in of_rank):
        assert batch.labels.shape == (-(-12 // devices) * devices // world_size, length)
        counted = batch.labels != IGNORED_LABEL
        assert (batch.input_ids[counted] == batch.labels[counted] - 1).all()
        labels += batch.labels[counted].tolist()
    assert sorted(labels) == list(range(1, 1003))


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
    with pytest.raises(InputError, match=r"1\.npy: id 999"):
        windows.batch(range(1_234_567 // LENGTH - 5, 1_234_567 // LENGTH + 5))
    (tmp_path / "signed").mkdir()
    signed = np.zeros(1_000_000, dtype=np.int32)
    signed[123_456] = -1
    np.save(tmp_path / "signed" / "0.npy", signed)
    with pytest.raises(InputError, match=r"0\.npy: id -1"):
        Windows(TokenStream(tmp_path / "signed"), LENGTH, vocab_size=50).batch(np.array([123_456 // LENGTH]))
