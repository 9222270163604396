"""Explains out-of-memory errors, estimates what a step needs, and finds smaller batches that make the same update."""

from __future__ import annotations

import bisect
import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator

from gpt2xla.config import ModelConfig, TrainConfig
from gpt2xla.errors import RunFailed
from gpt2xla.model.loss import LOGITS_AT_ONCE
from gpt2xla.processes.exits import exit_now_on_signal
from gpt2xla.runtime.base import GIB, Runtime, Shortage

SMALLER_MODEL = "add --activation-checkpointing block, shorten --seq-length, or choose a smaller model"
STATE_BYTES = 16  # per parameter: its weight, its gradient and Adam's two moments, in fp32


@contextlib.contextmanager
def explain_out_of_memory(runtime: Runtime, doing: str, advice: Callable[[Shortage], str]) -> Iterator[None]:
    """Turn running out of memory inside the block into a one-line RunFailed that says `doing`, such as "in step 1".

    `advice` is called after the failed work's memory is freed; what it returns ends the line."""
    try:
        yield
        return
    except Exception as error:
        shortage = runtime.memory.shortage(error)
        if shortage is None:
            raise
        # The traceback's local variables hold the activations.
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if runtime.world_size > 1:
        exit_now_on_signal(1)  # another process may report first; its launcher then ends this one
    raise RunFailed(f"out of memory on {shortage.place} {doing}: {advice(shortage)}")


def same_update(share: int, accum: int) -> list[tuple[int, int]]:
    """Return smaller micro-batches whose update sees as many sequences.

    Each is (sequences per device, micro-steps), the largest first."""
    return [(fewer, share * accum // fewer) for fewer in range(share - 1, 0, -1) if share * accum % fewer == 0]


def first_that_fits(batches: list[tuple[int, int]], fits: Callable[[int], bool]) -> tuple[int, int] | None:
    """Return the first of `same_update`'s batches that fits, with as few tries as possible; None if none does."""
    first = bisect.bisect_left(batches, True, key=lambda batch: fits(batch[0]))
    return batches[first] if first < len(batches) else None


def estimated(shortage: Shortage, share: int, parameters: int) -> int:
    """Return about how many sequences per device fit where `share` did not.

    The compiler counts a program without its arguments: weights and the optimizer's state, and gradients between
    micro-steps, take memory besides."""
    assert shortage.memory is not None
    assert shortage.needed is not None
    state = STATE_BYTES * parameters // shortage.state_split
    return max(0, int(share * (shortage.memory - state) / shortage.needed))


def train_advice(
    shortage: Shortage, train: TrainConfig, devices: int, parameters: int, fits: Callable[[int], bool | None]
) -> str:
    """Return what to do about a training step that does not fit, of a model with so many `parameters`.

    `fits` tries a number of sequences per device; it returns None where that would take a compile."""
    share, accum = train.micro_batch_size // devices, train.micro_steps
    batches = same_update(share, accum)
    one_fits = fits(1)
    if not batches or one_fits is False:
        return f"not even one sequence per device fits; {SMALLER_MODEL}"
    refused = f"--train-batch-size {train.micro_batch_size} does not fit"
    if one_fits:
        found = first_that_fits(batches, lambda fewer: fewer == 1 or bool(fits(fewer)))
        assert found is not None, "one sequence does"
        return f"{refused}; {_sequences(found[0])} per device fit: {_flags(found, devices, train)}"
    if shortage.needed is None:
        half = next((batch for batch in batches if batch[0] <= share // 2), batches[-1])
        return f"{refused}; {_flags(half, devices, train)}"
    most = estimated(shortage, share, parameters)
    found = next((batch for batch in batches if batch[0] <= most), None)
    if found is None:
        return f"{refused}, and by these figures not even one sequence per device does; {SMALLER_MODEL}"
    return f"{refused}; about {_sequences(most)} per device do: {_flags(found, devices, train)}"


def eval_advice(train: TrainConfig, devices: int, name: str) -> str:
    """Return what to do about an evaluation that does not fit. How many rows it takes at once does not change results."""
    if name == "sampling":
        return "leave --sample-interval out, or choose a smaller model"
    if name == "sketches":
        return "leave --sketches-interval out, or choose a smaller --eval-batch-size or model"
    if train.eval_batch_size <= devices:
        return f"not even one sequence per device fits; {SMALLER_MODEL}"
    half = max(1, train.eval_batch_size // 2 // devices) * devices
    return f"--eval-batch-size {train.eval_batch_size} does not fit; with {half}, or fewer, the results are the same"


def host_warning(model: ModelConfig, train: TrainConfig, parameters: int, free: int | None, devices: int) -> str | None:
    """Return a warning for before the first step on a CPU if `free` memory seems too small, else None.

    Most systems promise more memory than they have, and kill the process that uses it without a message."""
    share = train.micro_batch_size // devices
    needed = host_step_bytes(model, train, parameters, share)
    if free is None or needed <= free:
        return None
    smaller = same_update(share, train.micro_steps)
    fitting = [batch for batch in smaller if host_step_bytes(model, train, parameters, batch[0]) <= free]
    fix = _flags(fitting[0], devices, train) if fitting else SMALLER_MODEL
    return (
        f"warning: a step takes {needed / GIB:.1f} GiB or more per process, and {free / GIB:.1f} are free: the system may "
        f"kill the run without a message; {fix}"
    )


def host_step_bytes(model: ModelConfig, train: TrainConfig, parameters: int, share: int) -> int:
    """Return at least what a step on the CPU holds at its peak, besides weights and optimizer state.

    That is the gradients, and what `share` sequences keep for the backward pass, of which the loss holds the logits of one
    piece. How far the allocator stays above that depends on it."""
    width = 2 if train.mixed_precision in ("bf16", "fp16") else 4
    tokens = share * model.seq_length
    block, checkpointed = (tokens * size for size in kept_by_block(model, width))
    logits = min(width * tokens * model.vocab_size // max(1, train.loss_chunks), LOGITS_AT_ONCE["cpu"])
    kept = model.num_layers * block + logits
    if train.activation_checkpointing == "block":
        kept = model.num_layers * checkpointed + max(block, logits)
    return 4 * parameters + kept


def compiled_step_bytes(
    model: ModelConfig, train: TrainConfig, parameters: int, share: int, state_split: int = 1, *, kernels: bool = False
) -> int:
    """Return about the least in which a TPU's compiler fits a step with `share` sequences per device.

    With `kernels`, our kernels make the products of blocks, which the compiler then does not compute again. Weights and the
    optimizer's state, and gradients between micro-steps, are divided by `state_split`; what layers are gathered into is
    whole. Fitted to the compiler's own verdicts (docs/will-it-fit.md)."""
    state = (STATE_BYTES if train.micro_steps > 1 else STATE_BYTES - 4) * parameters // state_split
    gathered = 4 * parameters if state_split > 1 else 0
    head = 2 * 4 * model.vocab_size * model.d_model
    width = 4 if train.mixed_precision == "none" else 2  # auto is bf16 on TPUs
    logits = min(width * share * model.seq_length * model.vocab_size, LOGITS_AT_ONCE["xla"])
    again = 0 if kernels else 0.5
    return state + gathered + head + logits + share * compiled_sequence_bytes(model, train, again)


def compiled_sequence_bytes(model: ModelConfig, train: TrainConfig, again: float = 0.0) -> int:
    """Return about what all blocks keep of one sequence for the backward pass, where the compiler computes a share of it
    `again`, as it does when memory is short."""
    width = 4 if train.mixed_precision == "none" else 2
    block, checkpointed = kept_by_block(model, width, fused=True)
    block = int(block * (1 - again))
    kept = model.num_layers * block
    if train.activation_checkpointing == "block":
        kept = model.num_layers * checkpointed + block
    if train.attention == "sdpa" or model.dropout > 0:  # which keeps all scores, in fp32
        kept += model.num_layers * 4 * model.num_heads * model.seq_length
    return kept * model.seq_length


def kept_by_block(model: ModelConfig, width: int, *, fused: bool = False) -> tuple[int, int]:
    """Return how many bytes of each token a block keeps for the backward pass, and how many a checkpointed block keeps.

    A block keeps its two inputs in the fp32 residual stream and, in numbers of `width` bytes, the two layer norms' outputs,
    q, k, v, attention's output and, before and after the activation function, d_ff. A checkpointed block keeps its input.
    With `fused`, as XLA compiles them, they keep about 10 and 2 d_model numbers."""
    if fused:
        return 10 * model.d_model * width, 2 * model.d_model * width
    return 8 * model.d_model + width * (6 * model.d_model + 2 * model.d_ff), 4 * model.d_model


def _sequences(count: int) -> str:
    return f"{count} sequence{'s' if count > 1 else ''}"


def _flags(batch: tuple[int, int], devices: int, train: TrainConfig) -> str:
    share, accum = batch
    if train.batch_ramp:
        return f"--train-batch-size {share * devices} makes the same updates"
    flags = f"--train-batch-size {share * devices} --gradient-accum-step {accum}"
    return f"{flags} is the same {share * accum * devices:,} sequences per update"
