"""The windows of runs whose batch changes, against a count of one sequence after another."""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpt2xla.config import RunConfig, TrainConfig
from gpt2xla.data.batch_plan import BatchPlan, Phase
from gpt2xla.data.mixture import PATTERN, Mixture
from gpt2xla.data.permutation import permute
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.windows import TrainingOrder, Windows
from gpt2xla.errors import InputError
from gpt2xla.tpu_check.check import with_largest_updates

LENGTH = 4
HISTORIES = 220


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Windows]:
    """Data sets of odd sizes, small enough that a few updates end several epochs; each token occurs once in all."""
    folder = tmp_path_factory.mktemp("sets")
    result = []
    for number, count in enumerate((5, 13, 40, 101)):
        (folder / str(number)).mkdir()
        np.save(folder / str(number) / "0.npy", np.arange(count * LENGTH + 3, dtype=np.uint32) + 1000 * number)
        result.append(Windows(TokenStream(folder / str(number)), LENGTH, vocab_size=10_000))
    return result


@dataclasses.dataclass
class Data:
    """What a run reads, as a plain list: (data set, window) of sequence 0, 1, 2, ..."""

    sets: list[Windows]
    mixture: Mixture
    seed: int | None
    drop: int  # windows at the end of each epoch

    def sequences(self) -> Iterator[tuple[int, int]]:
        readers = [self._windows(number) for number in range(len(self.sets))]
        for n in itertools.count():
            number = int(self.mixture.pattern[n % PATTERN])
            yield number, next(readers[number])

    def _windows(self, number: int) -> Iterator[int]:
        count = self.sets[number].count
        for epoch in itertools.count():
            whole = np.arange(count)
            if self.seed is not None:
                whole = permute(whole, count, f"{self.seed}/{number}/{epoch}")
            assert sorted(whole.tolist()) == list(range(count))
            yield from whole[: count - self.drop].tolist()


@dataclasses.dataclass
class Checkpoint:
    step: int
    position: int  # how many sequences were read, counted one by one
    state: dict
    loaded: dict


def a_batch(rng: random.Random, devices: int, *, micro_batch: int | None) -> TrainConfig:
    """Options of a run: a plain batch or, where the micro-batch may be any, perhaps a ramp."""
    most = micro_batch or devices * rng.randint(2, 9)
    if micro_batch or rng.random() < 0.5:
        return TrainConfig(train_batch_size=most, gradient_accum_step=rng.randint(1, 4))
    starts = [0, *sorted(rng.sample(range(1, 20), rng.randint(0, 4)))]
    ramp = tuple(f"{devices * rng.randint(1, 12)}:{start}" for start in starts)
    return TrainConfig(train_batch_size=most, gradient_accum_step=None, batch_ramp=ramp)


def sequences_of(train: TrainConfig, step: int) -> int:
    """How many sequences update `step` of a run with these options reads, by the words of the options."""
    if not train.batch_ramp:
        return train.train_batch_size * (train.gradient_accum_step or 0)
    entries = [tuple(map(int, entry.split(":"))) for entry in train.batch_ramp]
    return [sequences for sequences, start in entries if start <= step][-1]


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_windows_of_a_history_are_those_of_a_count(seed: int, sets: list[Windows]) -> None:
    """A run that is started and resumed some times, from its newest checkpoint or an older one, each time with the batch of
    before, another one or a ramp, on another number of processes."""
    rng = random.Random(seed)
    chosen = rng.sample(sets, rng.randint(1, 3))
    drops = len(chosen) == 1 and rng.random() < 0.3
    micro_batch = 4 if drops else None  # with --drop-last it may not change
    data = Data(
        chosen,
        Mixture.of([rng.uniform(0.2, 1) for _ in chosen]),
        rng.choice([None, rng.randint(0, 9)]),
        chosen[0].count % 4 if drops else 0,
    )
    sequences, read = data.sequences(), []
    train = a_batch(rng, 4, micro_batch=micro_batch)
    checkpoints: list[Checkpoint] = []
    for _ in range(rng.randint(2, 4)):
        world_size = rng.choice([1, 2, 4])
        if rng.random() < 0.8:
            train = a_batch(rng, 4, micro_batch=micro_batch)
        plan, step, position, loaded = BatchPlan.of(train, 4), 0, 0, {}
        if checkpoints:
            saved = rng.choice([checkpoints[-1], rng.choice(checkpoints)])
            plan = plan.after(BatchPlan.saved(saved.state), saved.step)
            step, position, loaded = saved.step, saved.position, dict(saved.loaded)
        ranks = [
            TrainingOrder(chosen, data.mixture, plan, rank, world_size, drop_last=drops, shuffle_seed=data.seed)
            for rank in range(world_size)
        ]
        batches = [order.batches(step) for order in ranks]
        for _ in range(rng.randint(1, 6)):
            expected = sequences_of(train, step)
            assert plan.at(step).sequences == expected
            assert plan.sequences_before(step) == position
            while len(read) < position + expected:
                read.append(next(sequences))
            found = []
            while len(found) < expected:
                for batch in (next(part) for part in batches):
                    found += [(first // 1000, first % 1000 // LENGTH) for first in batch.input_ids[:, 0].tolist()]
            of_set = {windows.stream.read(0, 1)[0] // 1000: number for number, windows in enumerate(chosen)}
            assert [(of_set[name], window) for name, window in found] == read[position : position + expected]
            position, step = position + expected, step + 1
            loaded[step] = position
        # Every count of sequences is reached by the first of all updates that gets there.
        for wanted in rng.sample(range(1, position + 1), min(position, 20)):
            assert plan.steps_for(wanted) == min(s for s, reached in loaded.items() if reached >= wanted)
        checkpoints.append(Checkpoint(step, position, plan.state(), loaded))


def test_a_plan_costs_its_phases_and_not_its_steps() -> None:
    plan = BatchPlan((Phase(0, 32, 1), Phase(1000, 64, 2), Phase(10**12, 128, 1)))
    assert plan.sequences_before(0) == 0
    assert plan.sequences_before(10**15) == 32_000 + 128 * (10**12 - 1000) + 128 * (10**15 - 10**12)
    assert plan.steps_for(0) == 0
    assert plan.steps_for(32_000) == 1000
    assert plan.steps_for(32_001) == 1001
    assert plan.steps_for(10**18) == -(-(10**18 - 32_000) // 128) + 1000


def test_what_a_checkpoint_stores_is_checked() -> None:
    saved = {"batch": [[0, 256], [1500, 128]]}
    plan = BatchPlan.saved(saved)
    assert plan.state() == saved
    assert plan.after(plan, 1500).state() == saved
    assert plan.after(plan, 1600).state() == saved, "the same batch is no change"
    assert BatchPlan.saved({"--train-batch-size x --gradient-accum-step": 256}) == BatchPlan((Phase(0, 256, 1),))
    wrong = [
        [], [[1, 2]], [[0, 0]], [[0, -1]], [[0, 1.0]], [[0, True]], [[0, 1, 2]], [[0]], [0, 1], "01", None, {},
        [[0, 1], [0, 2]], [[0, 1], [5, 2], [3, 1]], [[0, 2**63]], [["0", "1"]],
    ]  # fmt: skip
    for sizes in wrong:
        with pytest.raises((ValueError, TypeError)):
            BatchPlan.saved({"batch": sizes})
    with pytest.raises(KeyError):
        BatchPlan.saved({"--seq-length": 4})


@pytest.mark.parametrize(
    ("entries", "most", "devices", "phases"),
    [
        (("32:0", "64:1000", "128:4000"), 32, 1, [(0, 32, 1), (1000, 32, 2), (4000, 32, 4)]),
        (("48:0", "80:7"), 32, 8, [(0, 24, 2), (7, 16, 5)]),
        (("7:0", "60:1"), 16, 1, [(0, 7, 1), (1, 15, 4)]),
        (("31:0",), 16, 1, [(0, 1, 31)]),
    ],
)
def test_a_ramp_takes_the_largest_micro_batches_that_divide(
    entries: tuple[str, ...], most: int, devices: int, phases: list[tuple[int, int, int]]
) -> None:
    train = TrainConfig(train_batch_size=most, gradient_accum_step=None, batch_ramp=entries)
    train.check()
    assert [tuple(phase) for phase in BatchPlan.of(train, devices).phases] == phases


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_ramp": ("32",)}, "--batch-ramp 32: write sequences:from-step, such as 32:0 64:1000"),
        ({"batch_ramp": ("32:0", "64:1e3")}, "--batch-ramp 64:1e3: write sequences:from-step"),
        ({"batch_ramp": ("32:-1",)}, "--batch-ramp 32:-1: write"),
        ({"batch_ramp": ("0:0",)}, "--batch-ramp 0:0: choose from 1 to 1,048,576 sequences"),
        ({"batch_ramp": ("64:1000",)}, "--batch-ramp 64:1000: the first entry must begin at step 0, such as 64:0"),
        ({"batch_ramp": ("4:0", "8:9", "16:9")}, "--batch-ramp 4:0 8:9 16:9: 16:9 must begin after step 9"),
        ({"batch_ramp": ("4:0",), "gradient_accum_step": 8}, "--batch-ramp and --gradient-accum-step 8 contradict"),
        ({"batch_ramp": ("4:0",), "drop_last": True}, "--drop-last has no meaning with --batch-ramp"),
    ],
)
def test_ramps_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        RunConfig.from_flat(options)


def test_a_ramp_must_divide_over_the_devices() -> None:
    train = TrainConfig(train_batch_size=32, gradient_accum_step=None, batch_ramp=("32:0", "60:9"))
    with pytest.raises(
        InputError, match="--batch-ramp 60:9: an update of 60 does not divide over 8 devices; use a mult"
    ):
        BatchPlan.of(train, 8)
    with pytest.raises(InputError, match="--train-batch-size 4 is less than a sequence for each of 8 devices"):
        BatchPlan.of(dataclasses.replace(train, train_batch_size=4, batch_ramp=("32:0",)), 8)


def test_the_bare_command_must_divide_over_the_devices() -> None:
    with pytest.raises(InputError, match=r"--sequences-per-update 256 does not divide over 3 devices; .* such as 258"):
        BatchPlan.of(TrainConfig(), 3)


def test_the_compile_check_takes_the_largest_updates_of_a_ramp() -> None:
    config = RunConfig.from_flat({"batch_ramp": ("32:0", "96:9", "64:20"), "train_batch_size": 32})
    train = with_largest_updates(config, "v5e-8").train
    assert (train.train_batch_size, train.gradient_accum_step, train.batch_ramp) == (32, 3, None)


def test_the_options_of_a_ramp_are_read_back(tmp_path: Path) -> None:
    """As run_config.json holds them, in which the steps of accumulation are null."""
    from gpt2xla.checkpoint.folder import write_run_config
    from gpt2xla.cli import parse_run
    from gpt2xla.config import TorchConfig

    config = RunConfig.from_flat({"batch_ramp": ("4:0", "8:5")})
    write_run_config(tmp_path, config)
    again, _ = parse_run(TorchConfig, ["--config", str(tmp_path / "run_config.json")])
    assert again.train == config.train
    assert again.train.gradient_accum_step is None
