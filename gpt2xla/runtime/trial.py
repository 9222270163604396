"""What is known, and can be tried, of a run whose micro-batch is still to be chosen."""

from __future__ import annotations

import dataclasses

from gpt2xla.config import RunConfig
from gpt2xla.config.batch import divisors
from gpt2xla.model.gpt2 import blank


class Trial:
    """The micro-batches among which `Memory.most_that_fit` chooses. Who makes one says how they are tried.

    Args:
        config: a run with --train-batch-size auto.
        devices: over which each micro-batch is split.

    Raises InputError if the update does not divide over the devices."""

    def __init__(self, config: RunConfig, devices: int) -> None:
        self.config, self.devices, self.sequences = config, devices, config.train.sequences  # of the largest update
        # Sequences per device and micro-step, the largest first; with each of them the update is the same.
        self.shares = divisors(self.sequences, devices)
        self.parameters = blank(config.model).num_parameters()

    def at_most(self, sequences: int) -> int:
        """Return the largest of the shares up to `sequences`, or the smallest of all."""
        return next((share for share in self.shares if share <= sequences), self.shares[-1])

    def config_of(self, share: int) -> RunConfig:
        """Return the run with numbers instead of auto."""
        train = self.config.train.with_micro_batch(share * self.devices)
        return dataclasses.replace(self.config, train=train)

    def rehearse(self, share: int) -> bool | None:
        """Return whether all processes have room for forward and backward with `share`; None where that cannot be tried.
        Collective."""
        raise NotImplementedError

    def update(self, share: int) -> None:
        """Make a whole update with `share`, as the run will make its first, of weights that are then dropped. Collective.
        Raises what the device raises if memory does not suffice."""
        raise NotImplementedError
