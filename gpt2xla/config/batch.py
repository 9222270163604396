"""How large an update is: the rules between --train-batch-size, --gradient-accum-step and --sequences-per-update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpt2xla.config.options import require

SEQUENCES = 256  # that an update sees in the published recipe
MICRO_BATCH, MICRO_STEPS = 32, 8  # where only the other one is given

OPTIONS = ("train_batch_size", "gradient_accum_step", "sequences_per_update")


def complete(batch: Any, accum: Any, sequences: Any) -> tuple[Any, Any, Any]:
    """Return the three options with what follows from those that are given; None means not given.

    The batch stays "auto" where only the sequences of an update are known. Otherwise they become None, as the other two say
    all. Wrong values, which `check_given` and the checks of types and sizes report, stay as they are."""
    if batch == "auto" and accum is None:
        return batch, None, SEQUENCES if sequences is None else sequences
    if sequences is None:
        return MICRO_BATCH if batch == "auto" else batch, MICRO_STEPS if accum is None else accum, None
    if not all(_is_count(n) for n in (sequences, batch if accum is None else accum)):
        return batch, accum, sequences
    return (sequences // accum if batch == "auto" else batch), (sequences // batch if accum is None else accum), None


def check_given(options: Mapping[str, Any]) -> None:
    """Raise InputError if those of the three that `options` holds contradict each other."""
    batch, accum, sequences = (options.get(name) for name in OPTIONS)
    if batch == "auto" and accum is not None:
        require(
            sequences is not None,
            f"--train-batch-size auto chooses the number of micro-steps too: leave --gradient-accum-step {accum} out, or "
            "name --sequences-per-update instead of auto",
        )
    counts: list[int] = [n for n in (batch, accum) if _is_count(n)]  # type: ignore[misc]
    if not counts or not _is_count(sequences):
        return
    assert sequences is not None
    named = {"--train-batch-size": batch, "--gradient-accum-step": accum}
    words = " and ".join(f"{flag} {value}" for flag, value in named.items() if _is_count(value))
    product = math.prod(counts)
    require(
        len(counts) == 1 or product == sequences,
        f"--sequences-per-update {sequences} contradicts {words}, which make {product}; leave one of the three out",
    )
    most = max(n for n in range(1, min(product, sequences) + 1) if sequences % n == 0)
    require(
        sequences % product == 0,
        f"--sequences-per-update {sequences} does not divide into {words}; use {most}, or another divisor of {sequences}",
    )


def of_resumed_run(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the three options that are known of a run that is resumed; `complete` gives the others.

    Its stored micro-batch and micro-steps stay, unless the user asks for others: `auto` does not, since the same command
    resumes a run. With --sequences-per-update alone, the micro-batch stays."""
    batch, accum = asked.get("train_batch_size", "auto"), asked.get("gradient_accum_step")
    sequences = asked.get("sequences_per_update")
    if batch == "auto" and (accum is None or sequences is None):
        batch = saved.get("train_batch_size", batch)
    if accum is None and sequences is None:
        accum = saved.get("gradient_accum_step")
    found = {"train_batch_size": batch, "gradient_accum_step": accum, "sequences_per_update": sequences}
    return {name: value for name, value in found.items() if value is not None}


def divisors(sequences: int, devices: int) -> list[int]:
    """Return the micro-batches that make updates of `sequences`, as sequences per device, the largest first.

    Raises InputError if the update does not divide over the devices."""
    fix = -(-sequences // devices) * devices
    require(
        sequences % devices == 0,
        f"--sequences-per-update {sequences} does not divide over {devices} devices; use a multiple of {devices}, such as "
        f"{fix}",
    )
    each = sequences // devices
    return [share for share in range(each, 0, -1) if each % share == 0]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1
