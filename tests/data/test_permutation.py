"""A permutation for every size, even and keyed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2xla.data.permutation import permute


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=5))
def test_it_is_a_permutation(size: int, key: str) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 10, 99, 100, 101, 65536, 1_000_003])
def test_every_size_small_and_large(size: int) -> None:
    assert (np.bincount(permute(np.arange(size), size, "k"), minlength=size) == 1).all()


def test_each_place_can_be_asked_for_by_itself_even_among_very_many() -> None:
    size = 10**13  # no memory for all of these
    places = np.array([0, 1, 2, 10**12, size - 1])
    together = permute(places, size, "k")
    assert together.tolist() == [permute(np.array([place]), size, "k").item() for place in places]
    assert len(set(together.tolist())) == 5
    assert (together >= 0).all()
    assert (together < size).all()


def test_another_key_is_another_order() -> None:
    orders = {tuple(permute(np.arange(125), 125, key).tolist()) for key in ("1/0", "1/1", "2/0", "1/0")}
    assert len(orders) == 3


@pytest.mark.parametrize("size", [4, 10, 17])
def test_it_spreads_evenly(size: int) -> None:
    """Position i lands on value j about equally often over many keys, and so does the pair of values of two neighbours."""
    keys = 4000
    orders = np.stack([permute(np.arange(size), size, str(key)) for key in range(keys)])
    for i in range(size):
        counts = np.bincount(orders[:, i], minlength=size)
        assert chi_squared(counts) < size - 1 + 6 * (2 * (size - 1)) ** 0.5  # mean plus six standard deviations
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size**2).reshape(size, size)
    possible = pairs[~np.eye(size, dtype=bool)]
    assert chi_squared(possible) < len(possible) + 6 * (2 * len(possible)) ** 0.5


def test_neighbours_are_torn_apart() -> None:
    """In a random order of n, the mean distance of neighbours is n / 3, and neighbours stay in order half of the time."""
    size = 100_000
    steps = np.diff(permute(np.arange(size), size, "k"))
    assert abs(np.abs(steps).mean() / size - 1 / 3) < 0.01
    assert abs((steps > 0).mean() - 0.5) < 0.01


def chi_squared(counts: np.ndarray) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
