"""When memory runs out: how errors say so, how much a step needs, and which smaller batches make the same update."""

from __future__ import annotations

import bisect
import contextlib
import gc
import re
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from gpt2xla.errors import RunFailed
from gpt2xla.exits import settled

if TYPE_CHECKING:  # it imports torch, for which no mistake must wait
    from gpt2xla.config import ModelConfig, TrainConfig
    from gpt2xla.runtime.base import Runtime

GIB = 2**30
SMALLER_MODEL = "add --activation-checkpointing block, shorten --seq-length, or choose a smaller model"
_STATE_BYTES = 16  # per parameter: its weight, its gradient and Adam's two moments, in fp32
_SCALE = {"": 1, "K": 2**10, "M": 2**20, "G": GIB}


class Shortage(NamedTuple):
    """Memory that has run out.

    Attributes:
        place: where, in words.
        memory: bytes that there are for one program; None if unknown.
        needed: bytes that the refused program takes beside its arguments; None where it broke off on its way.
        state_split: over how many devices weights, gradients and the optimizer's state are divided.
    """

    place: str
    memory: int | None = None
    needed: int | None = None
    state_split: int = 1


@contextlib.contextmanager
def explained(runtime: Runtime, doing: str, mend: Callable[[Shortage], str]) -> Iterator[None]:
    """Around work on the device: memory that runs out in it is one line. `mend` is asked for its end when all that the
    failed work held is free again."""
    shortage: Shortage | None = None
    try:
        yield
    except Exception as error:
        shortage = runtime.shortage(error)
        if shortage is None:
            raise
        # The activations live in the locals of the functions that it came through.
        traceback.clear_frames(error.__traceback__)
    if shortage is not None:
        gc.collect()
        if runtime.world_size > 1:
            settled(1)  # another process may be the first to tell, and the launcher ends this one meanwhile
        raise RunFailed(f"out of memory on {shortage.place} {doing}: {mend(shortage)}")


def compiler_figures(message: str) -> tuple[int, int] | None:
    """(needed, memory) in bytes, from the message with which XLA's compiler for TPUs refuses a program; None if it is
    another one. It has two ways: the whole program needs too much, or a single array does, which is all it then tells.
    """
    if single := re.search(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)", message):
        return int(single[1]), int(single[2])
    if used := re.search(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm", message):
        return int(float(used[1]) * _SCALE[used[2]]), int(float(used[3]) * _SCALE[used[4]])
    return None


def same_update(share: int, accum: int) -> list[tuple[int, int]]:
    """Smaller micro-batches whose update sees as many sequences: (sequences per device, micro-steps), the largest first."""
    return [(fewer, share * accum // fewer) for fewer in range(share - 1, 0, -1) if share * accum % fewer == 0]


def tried(batches: list[tuple[int, int]], fits: Callable[[int], bool]) -> tuple[int, int] | None:
    """The first of `batches`, as `same_update` gives them, that fits, by as few tries as can be; None if none does."""
    first = bisect.bisect_left(batches, True, key=lambda batch: fits(batch[0]))
    return batches[first] if first < len(batches) else None


def estimated(shortage: Shortage, share: int, parameters: int) -> int:
    """How many sequences per device may fit where `share` did not. The compiler counts a program without its arguments:
    weights and the optimizer's state are there beside it, and gradients between micro-steps."""
    assert shortage.memory is not None
    assert shortage.needed is not None
    state = _STATE_BYTES * parameters // shortage.state_split
    return max(0, int(share * (shortage.memory - state) / shortage.needed))


def train_advice(
    shortage: Shortage, train: TrainConfig, devices: int, parameters: int, fits: Callable[[int], bool | None]
) -> str:
    """What to do about a training step that does not fit.

    Args:
        parameters: of the model.
        fits: tries out a number of sequences per device; None where that would take a compile.
    """
    share, accum = train.train_batch_size // devices, train.gradient_accum_step
    batches = same_update(share, accum)
    one_fits = fits(1)
    if not batches or one_fits is False:
        return f"not even one sequence per device fits; {SMALLER_MODEL}"
    refused = f"--train-batch-size {train.train_batch_size} does not fit"
    if one_fits:
        found = tried(batches, lambda fewer: fewer == 1 or bool(fits(fewer)))
        assert found is not None, "one sequence does"
        return f"{refused}; {_sequences(found[0])} per device fit: {_flags(found, devices)}"
    if shortage.needed is None:
        half = next((batch for batch in batches if batch[0] <= share // 2), batches[-1])
        return f"{refused}; {_flags(half, devices)}"
    most = estimated(shortage, share, parameters)
    found = next((batch for batch in batches if batch[0] <= most), None)
    if found is None:
        return f"{refused}, and by these figures not even one sequence per device does; {SMALLER_MODEL}"
    return f"{refused}; about {_sequences(most)} per device do: {_flags(found, devices)}"


def eval_advice(train: TrainConfig, devices: int, name: str) -> str:
    """What to do about an evaluation that does not fit: its results do not depend on how many rows are computed at once."""
    if name == "sampling":
        return "leave --sample-interval out, or choose a smaller model"
    if train.eval_batch_size <= devices:
        return f"not even one sequence per device fits; {SMALLER_MODEL}"
    half = max(1, train.eval_batch_size // 2 // devices) * devices
    return f"--eval-batch-size {train.eval_batch_size} does not fit; with {half}, or fewer, the results are the same"


def host_warning(model: ModelConfig, train: TrainConfig, parameters: int, free: int | None, devices: int) -> str | None:
    """A line to be printed before the first step on a CPU, if it looks as if there were not `free` memory enough: most
    systems promise more than they have, and end the process that takes it, without a word."""
    share = train.train_batch_size // devices
    needed = host_step_bytes(model, train, parameters, share)
    if free is None or needed <= free:
        return None
    smaller = same_update(share, train.gradient_accum_step)
    fitting = [batch for batch in smaller if host_step_bytes(model, train, parameters, batch[0]) <= free]
    mend = _flags(fitting[0], devices) if fitting else SMALLER_MODEL
    return (
        f"warning: a step takes {needed / GIB:.1f} GiB or more per process, and {free / GIB:.1f} are free: the system may "
        f"end the run without a word; {mend}"
    )


def host_step_bytes(model: ModelConfig, train: TrainConfig, parameters: int, share: int) -> int:
    """What a step on the CPU holds at its peak, at least, beside weights and optimizer state: gradients, and what `share`
    sequences keep for the backward pass. How far the allocator stays above that depends on it.

    Of each token a block keeps its two inputs in the residual stream, the two layer norms' outputs, q, k, v, attention's
    output and, before and after the activation function, d_ff: 8 d_model + 2 d_ff numbers, of 2 bytes under autocast but for
    the residual stream's. A checkpointed block keeps its input. The loss holds the logits of one piece.
    """
    from gpt2xla.loss import LOGITS_AT_ONCE

    width = 2 if train.mixed_precision in ("bf16", "fp16") else 4
    tokens = share * model.seq_length
    block = tokens * (2 * 4 * model.d_model + width * (6 * model.d_model + 2 * model.d_ff))
    logits = min(width * tokens * model.vocab_size // max(1, train.loss_chunks), LOGITS_AT_ONCE["cpu"])
    kept = model.num_layers * block + logits
    if train.activation_checkpointing == "block":
        kept = model.num_layers * tokens * 4 * model.d_model + max(block, logits)
    return 4 * parameters + kept


def _sequences(count: int) -> str:
    return f"{count} sequence{'s' if count > 1 else ''}"


def _flags(batch: tuple[int, int], devices: int) -> str:
    share, accum = batch
    flags = f"--train-batch-size {share * devices} --gradient-accum-step {accum}"
    return f"{flags} is the same {share * accum * devices:,} sequences per update"
