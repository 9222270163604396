"""The number of tokens by which an update's loss is divided, against a count of what all processes read."""

import numpy as np
import pytest
from conftest import random_samples, write_split
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2xla.data.batch_plan import BatchPlan, Phase
from gpt2xla.data.mixture import Mixture
from gpt2xla.data.preparation.rows import write_rows
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.data.windows import TrainingOrder, Windows
from gpt2xla.model.loss import IGNORED_LABEL

LENGTH = 11
MIXTURES = {
    chosen: Mixture.of([1.0 + number for number in chosen]) for chosen in ((0,), (2,), (0, 1), (0, 2), (2, 1, 0))
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Windows]:
    """Two of masked rows, whose borders of rows, shards and bytes differ, and one of plain tokens; all smaller than an epoch
    of some runs below."""
    folder = tmp_path_factory.mktemp("sets")
    for seed, shard_size in ((0, 101), (1, 10_000)):
        samples = random_samples(40 + 70 * seed, longest=9, seed=seed)
        write_rows(folder / f"{seed}", samples, load_tokenizer("bytes"), row_length=LENGTH, shard_size=shard_size)
    write_split(folder / "plain", np.arange(500) % 97)
    return [Windows(TokenStream(folder / name), LENGTH, 257) for name in ("0", "1", "plain")]


@settings(max_examples=30, deadline=None)
@given(
    chosen=st.sampled_from(list(MIXTURES)),
    phases=st.sampled_from([((0, 6, 1),), ((0, 12, 3),), ((0, 6, 1), (2, 6, 3), (5, 24, 2))]),
    world_size=st.sampled_from([1, 2, 3]),
    shuffle_seed=st.sampled_from([None, 7]),
    drop_last=st.booleans(),
    step=st.integers(0, 12),
)
def test_trained_tokens_are_the_labels_that_count_in_all_batches_of_all_processes(
    sets: list[Windows],
    chosen: tuple[int, ...],
    phases: tuple[tuple[int, int, int], ...],
    world_size: int,
    shuffle_seed: int | None,
    drop_last: bool,
    step: int,
) -> None:
    plan = BatchPlan(tuple(Phase(*phase) for phase in phases))
    orders = [
        TrainingOrder(
            [sets[number] for number in chosen], MIXTURES[chosen], plan, rank=rank,
            world_size=world_size, drop_last=drop_last and len(chosen) == 1, shuffle_seed=shuffle_seed,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    batches = [order.batch(step, micro_step) for order in orders for micro_step in range(plan.at(step).accum)]
    counted = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
    assert {order.trained_tokens(step) for order in orders} == {counted}
    if chosen == (2,):
        assert counted == plan.at(step).sequences * LENGTH
