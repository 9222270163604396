"""How many sequences each update reads. From this list alone follows the number of the first sequence of any update.

A run may change its batch, by --batch-ramp or when it is resumed with another one. Nothing but the list is stored then: the
position in the data stays a pure function of the step.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt2xla.config import TrainConfig
from gpt2xla.config.batch import divisors
from gpt2xla.config.train import parse_ramp
from gpt2xla.errors import InputError, counted

SAVED_SIZES = "batch"  # the key in a checkpoint
_SAVED_ONCE = "--train-batch-size x --gradient-accum-step"  # by older checkpoints: one number for the whole run


class Phase(NamedTuple):
    """Updates of one size.

    Attributes:
        from_step: the first of these updates, counted from 0.
        batch_size: sequences per micro-step, over all devices together.
        accum: micro-steps per update.
    """

    from_step: int
    batch_size: int
    accum: int

    @property
    def sequences(self) -> int:
        """Per update, over all devices and micro-steps."""
        return self.batch_size * self.accum

    def options(self, train: TrainConfig) -> TrainConfig:
        """Return `train` with the batch of these updates."""
        return dataclasses.replace(train, train_batch_size=self.batch_size, gradient_accum_step=self.accum)

    def describe(self, devices: int, seq_length: int) -> str:
        """Return in words how an update is split."""
        return (
            f"{counted(self.batch_size // devices, 'sequence')} x {counted(devices, 'device')} x "
            f"{counted(self.accum, 'micro-step')} = {counted(self.sequences, 'sequence')} = "
            f"{self.sequences * seq_length:,} tokens per step"
        )


@dataclass(frozen=True)
class BatchPlan:
    """The phases of a run, the first from step 0 on. All methods take time in the number of phases, not of steps."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        starts = [phase.from_step for phase in self.phases]
        assert starts[:1] == [0]
        assert all(a < b for a, b in itertools.pairwise(starts))
        assert all(min(phase.batch_size, phase.accum) >= 1 for phase in self.phases)

    @classmethod
    def of(cls, train: TrainConfig, devices: int) -> BatchPlan:
        """Return the plan of a new run. Raises InputError if a micro-batch does not divide over the devices."""
        if train.batch_ramp is not None:
            return cls(tuple(_phase(*entry, train.micro_batch_size, devices) for entry in parse_ramp(train.batch_ramp)))
        if train.train_batch_size == "auto":  # not chosen yet: what is known is the sequences of an update
            divisors(train.sequences, devices)
            return cls((Phase(0, train.sequences, 1),))
        share_of("--train-batch-size", train.micro_batch_size, devices)
        return cls((Phase(0, train.micro_batch_size, train.micro_steps),))

    @classmethod
    def saved(cls, data: Mapping[str, Any]) -> BatchPlan:
        """Return the plan that a checkpoint stores in `data`. How its updates were split into micro-steps is not known.

        Raises ValueError, KeyError or TypeError if it stores none."""
        sizes = data[SAVED_SIZES] if SAVED_SIZES in data else [[0, data[_SAVED_ONCE]]]
        numbers = [number for size in sizes for number in size]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"not whole numbers: {numbers}")
        steps = [from_step for from_step, _ in sizes]
        if steps[:1] != [0] or any(a >= b for a, b in itertools.pairwise(steps)) or any(n < 1 for _, n in sizes):
            raise ValueError(f"not ascending from step 0: {sizes}")
        return cls(tuple(Phase(from_step, sequences, 1) for from_step, sequences in sizes))

    def state(self) -> dict[str, list[list[int]]]:
        """Return plain values for the checkpoint, which `saved` reads: [from step, sequences per update] of each phase."""
        sizes: list[list[int]] = []
        for phase in self.phases:
            if not sizes or sizes[-1][1] != phase.sequences:
                sizes.append([phase.from_step, phase.sequences])
        return {SAVED_SIZES: sizes}

    def after(self, past: BatchPlan, step: int) -> BatchPlan:
        """Return the plan that is `past` for the updates before `step`, and this one from there on."""
        return BatchPlan((*(phase for phase in past.phases if phase.from_step < step), *self.from_step(step)))

    def from_step(self, step: int) -> list[Phase]:
        """Return the phases of updates from `step` on, the first of which begins there."""
        return [self.at(step)._replace(from_step=step), *(phase for phase in self.phases if phase.from_step > step)]

    def at(self, step: int) -> Phase:
        """Return the phase of update `step`, counted from 0."""
        return self.phases[bisect.bisect_right(self.phases, step, key=lambda phase: phase.from_step) - 1]

    def sequences_before(self, step: int) -> int:
        """Return how many sequences all updates before `step` read together."""
        ends = [phase.from_step for phase in self.phases[1:]]
        spans = zip(self.phases, [*ends, step], strict=True)
        return sum(phase.sequences * max(0, min(end, step) - phase.from_step) for phase, end in spans)

    def steps_for(self, sequences: int) -> int:
        """Return the fewest updates that read at least `sequences` sequences together."""
        reached = 0
        for phase, end in itertools.zip_longest(self.phases, [phase.from_step for phase in self.phases[1:]]):
            steps = -(-max(0, sequences - reached) // phase.sequences)
            if end is None or phase.from_step + steps <= end:
                break
            reached += phase.sequences * (end - phase.from_step)
        return phase.from_step + steps


def _phase(from_step: int, sequences: int, most: int, devices: int) -> Phase:
    """Return the phase whose micro-steps are as large as `most` and an even division over devices and micro-steps allow."""
    share = share_of(f"--batch-ramp {sequences}:{from_step}: an update of", sequences, devices)
    if most < devices:
        raise InputError(f"--train-batch-size {most} is less than a sequence for each of {devices} devices; raise it")
    largest = max(part for part in range(1, min(share, most // devices) + 1) if share % part == 0)
    return Phase(from_step, largest * devices, share // largest)


def share_of(option: str, batch_size: int, world_size: int) -> int:
    """Return one process's share of a global batch. Raises InputError if it does not divide evenly."""
    if batch_size % world_size:
        fix = f"use a multiple of {world_size}, such as {-(-batch_size // world_size) * world_size}"
        raise InputError(f"{option} {batch_size} does not divide over {world_size} devices; {fix}")
    return batch_size // world_size
