"""Which data set each sequence comes from, against counting."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2xla.config.paths import parse_weights
from gpt2xla.data.batch_plan import BatchPlan, Phase
from gpt2xla.data.mixture import PATTERN, Mixture
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.windows import TrainingOrder, Windows
from gpt2xla.errors import InputError

LENGTH = 4


def test_weights_are_read_and_a_single_folder_needs_none() -> None:
    assert parse_weights("--train-dir", ["a=0.7", "gs://b/c=3e-1"]) == (["a", "gs://b/c"], [0.7, 0.3])
    assert parse_weights("--train-dir", ["a"]) == (["a"], [1.0])
    assert parse_weights("--train-dir", ["runs/lr=x/data"]) == (["runs/lr=x/data"], [1.0])
    assert parse_weights("--train-dir", ["runs/k=x=2"]) == (["runs/k=x"], [2.0])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["a", "b"], "--train-dir a has no weight"),
        (["a=1", "b"], "--train-dir b has no weight"),
        (["a=1", "b=much"], "--train-dir b=much has no weight"),
        (["a=1", "b=0"], "b=0: choose a weight above 0"),
        (["a=1", "b=-2"], "b=-2: choose a weight above 0"),
        (["a=1", "b=nan"], "b=nan: choose a weight above 0"),
        (["a=inf", "b=1"], "a=inf: choose a weight above 0"),
        (["a=1", "a=2"], "names a twice"),
        (["a=1", "./b/../a/=2"], "names ./b/../a/ twice"),
        (["gs://x/a=1", "gs://x/a/=2"], "names gs://x/a/ twice"),
    ],
)
def test_wrong_weights_are_refused(entries: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_weights("--train-dir", entries)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
def test_the_pattern_holds_each_set_by_its_weight(weights: list[int]) -> None:
    mixture = Mixture.of(weights)
    counted = np.bincount(mixture.pattern, minlength=len(weights))
    assert counted.sum() == PATTERN
    assert tuple(counted) == mixture.counts
    for count, weight in zip(counted, weights, strict=True):
        exact = Fraction(weight, sum(weights)) * PATTERN
        # Off by less than one, except where a tiny weight got its single entry.
        assert max(1, exact - len(weights)) <= count < exact + 1 or count == 1


def test_weights_need_not_sum_to_one() -> None:
    assert Mixture.of([7, 3]).counts == Mixture.of([0.7, 0.3]).counts == (7000, 3000)
    assert Mixture.of([1, 1, 1]).counts == (3334, 3333, 3333)
    assert Mixture.of([1e-9, 1.0]).counts == (1, 9999)


def test_any_place_is_known_without_those_before_it() -> None:
    """Counted from the start by brute force over two and a half patterns; and any run of sequences says the same."""
    mixture = Mixture.of([5, 3, 2])
    seen, expected = [0, 0, 0], []
    for n in range(25_000):
        number = int(mixture.pattern[n % PATTERN])
        expected.append((number, seen[number]))
        seen[number] += 1
    for first, count in ((0, 1), (0, 32), (9_990, 32), (19_999, 3), (12_345, 10_100), (24_999, 1)):
        found: list = [None] * count
        for number, rows, start in mixture.runs(first, count):
            for place, row in enumerate(rows.tolist()):
                found[row] = (number, start + place)
        assert found == expected[first : first + count]
    ((number, _, start),) = mixture.runs(10**12, 1)
    assert start == 10**12 // PATTERN * mixture.counts[number]


def test_any_stretch_holds_about_the_shares() -> None:
    chosen = Mixture.of([0.5, 0.5]).pattern
    by_hundreds = chosen.reshape(100, 100).sum(axis=1)
    assert by_hundreds.min() > 20
    assert by_hundreds.max() < 80
    assert by_hundreds.std() > 2, "drawn, not laid out in stripes"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Windows]:
    """Three data sets with tokens of their own, of 7, 40 and 101 windows."""
    folder = tmp_path_factory.mktemp("sets")
    result = []
    for number, count in enumerate((7, 40, 101)):
        tokens = np.arange(count * LENGTH + 2, dtype=np.uint32) + 1000 * number
        (folder / str(number)).mkdir()
        for shard, part in enumerate(np.split(tokens, [9, 10])):
            np.save(folder / str(number) / f"{shard}.npy", part)
        result.append(Windows(TokenStream(folder / str(number)), LENGTH, vocab_size=10_000))
    return result


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_each_set_has_its_own_epochs_for_any_number_of_processes(
    sets: list[Windows], world_size: int, shuffle_seed: int | None
) -> None:
    mixture = Mixture.of([0.2, 0.5, 0.3])
    shares = [
        TrainingOrder(sets, mixture, BatchPlan((Phase(0, 6, 2),)), rank, world_size, drop_last=False,
                      shuffle_seed=shuffle_seed)
        for rank in range(world_size)
    ]  # fmt: skip
    seen: list[list[int]] = [[], [], []]
    for micro_step in range(150):
        for order in shares:
            batch = order.batch(*divmod(micro_step, 2))
            assert (batch.labels == batch.input_ids + 1).all()
            for row in batch.input_ids.tolist():
                assert row == list(range(row[0], row[0] + LENGTH))
                seen[row[0] // 1000].append(row[0] % 1000 // LENGTH)
    assert [len(part) for part in seen] == np.bincount(mixture.pattern[:900]).tolist()
    for windows, part in zip(sets, seen, strict=True):
        for start in range(0, len(part) - windows.count, windows.count):
            epoch = part[start : start + windows.count]
            assert sorted(epoch) == list(range(windows.count))
            assert shuffle_seed is not None or epoch == sorted(epoch)


def test_drop_last_is_refused_for_several(sets: list[Windows]) -> None:
    with pytest.raises(InputError, match="--drop-last has no meaning for several data sets"):
        TrainingOrder(
            sets, Mixture.of([1, 1, 1]), BatchPlan((Phase(0, 2, 1),)), 0, 1, drop_last=True, shuffle_seed=None
        )
