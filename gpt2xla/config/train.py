"""The options of training: its length and batch, how it computes, and what is evaluated and saved on the way."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gpt2xla.config import batch, paths
from gpt2xla.config.options import OFF, Share, flag, option, require, require_at_least, require_at_most

_MOST_SEQUENCES = 2**20  # a larger number is a slip, too
_MOST_EPOCHS = 1_000_000
INTERVALS = ("valid_interval", "hellaswag_interval", "sample_interval", "sketches_interval", "save_interval")

Precision = Literal["auto", "none", "bf16", "fp16"]
PRECISION_ALIASES = dict.fromkeys(("fp32", *OFF), "none")


@dataclass(frozen=True)
class TrainConfig:
    """Training"""

    train_steps: int = option(20_000, "optimizer updates in the whole run")
    epochs: float | None = option(
        None, "instead of --train-steps: so many passes over the training data, in the fewest updates that read them"
    )
    train_batch_size: int | Literal["auto"] = option(
        "auto",
        "sequences per micro-step, over all devices together; auto: as many as the devices' memory holds and "
        "--sequences-per-update is a multiple of; 32 with --gradient-accum-step alone",
    )
    gradient_accum_step: int | None = option(
        None,
        "micro-steps per optimizer update (default: what makes --sequences-per-update; 8 with --train-batch-size alone)",
    )
    sequences_per_update: int | None = option(
        None,
        "sequences that an optimizer update sees, over all its micro-steps (default: 256, unless --train-batch-size or "
        "--gradient-accum-step is given)",
    )
    batch_ramp: tuple[str, ...] | None = option(
        None,
        "sequences per update from each step on, such as 32:0 64:1000 128:4000, instead of --gradient-accum-step; a "
        "micro-step takes as many of them as divide evenly, at most --train-batch-size",
    )
    mixed_precision: Precision = option(
        "auto",
        "compute type over fp32 weights: bf16; fp16, which scales the loss; none: fp32 throughout; auto: a resumed run's "
        "own, otherwise bf16 on TPUs and GPUs that have it, fp16 on other GPUs with fast fp16, and none on CPUs, on MPS and "
        "for --do-test, so that losses are comparable",
        aliases=PRECISION_ALIASES,
    )
    matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest", "precision of fp32 matrix products: highest is exact, high is TF32, medium may use bf16"
    )
    deterministic: bool = option(
        False,
        "CUDA: use only kernels that add in a fixed order, so that the same command gives the same numbers to the last bit; "
        "slower; CPUs and TPUs always do so",
    )
    attention: Literal["auto", "sdpa", "chunked", "kept", "flash"] = option(
        "auto",
        "auto: the device's best; sdpa: torch's own; chunked: computes scores twice and never keeps them; kept: keeps the "
        "attention weights, on CPUs; flash: our own kernel, on TPU v3 and later",
    )
    loss_chunks: int = option(0, "compute logits and loss in this many pieces to save memory; 0 lets the device choose")
    document_mask: bool | None = option(
        None,
        "attention stays within documents, and positions restart in each: an end-of-text token begins the next one; "
        "validation measures the same (default: for masked rows, such as conversations; not in GPT-2's recipe)",
    )
    neftune_alpha: float = option(
        0.0,
        "in training, add uniform noise of at most this / sqrt(--seq-length x --d-model) to token embeddings (NEFTune); 5 "
        "is common in instruct tuning, 0 means none",
    )
    activation_checkpointing: Literal["none", "block"] = option(
        "none",
        "block: keep only each block's input for the backward pass, and compute the rest again; none: keep everything",
        aliases=dict.fromkeys(OFF, "none"),
    )
    compile: bool | None = option(
        None,
        "torch.compile the blocks (default: in long runs, where the device has no fused blocks); XLA always compiles",
    )
    eval_batch_size: int = option(32, "sequences per validation batch, over all devices together")
    valid_steps: int | Literal["all"] = option(
        100, "validation batches, or fewer if the split ends first; all: each token of the split once"
    )
    valid_interval: int | Share = option(
        500, "updates between validations, or their share of the run, such as 10%; 0 means only at the end"
    )
    hellaswag_interval: int | Share = option(
        0, "the same for HellaSwag evaluations, with one more at the end; 0 means none"
    )
    hellaswag_data: str | None = option(
        None, "HellaSwag's items, JSON lines (default: the hub's 10,042)", is_path=True, check=paths.check_file
    )
    sample_interval: int | Share = option(0, "the same for sample texts that the model writes; 0 means none")
    sample_prompt: str = option("", "text that the samples continue (default: they begin after an end-of-text token)")
    special_tokens_in_text: Literal["as-text", "as-ids", "refuse"] = option(
        "as-text",
        "how to read special tokens spelled in --sample-prompt: as-text takes the letters, as-ids takes the tokens, refuse "
        "stops the run",
    )
    sketches_interval: int | Share = option(
        0,
        "the same for models of sketches: how many held-out drawings are recognised, and a picture of some that are drawn, "
        "sketches/step-*.png; 0 means none",
    )
    keep_best: bool | None = option(
        None,
        "save the checkpoint of the lowest validation loss whenever there is a new one, and keep it: FOLDER@best names it "
        "(default: with --early-stopping-patience)",
    )
    early_stopping_patience: int = option(
        0, "end the run after this many validations in a row that did not improve its loss; 0 means never"
    )
    early_stopping_min_delta: float = option(
        0.0,
        "nats by which the loss must fall, or more, since it last improved; less is no improvement for the patience",
    )
    save_interval: int | Share = option(
        1000, "updates between checkpoints, or their share of the run; 0 means only at the end"
    )
    saved_checkpoint_limit: int = option(6, "how many of the newest checkpoints to keep, beside the best; 0 keeps all")
    on_save_error: Literal["stop", "go-on"] = option(
        "stop", "if a checkpoint cannot be written: stop: try once more, then end the run; go-on: continue training"
    )
    skip_nonfinite: int = option(
        0,
        "updates that may be skipped for a NaN or infinite loss or gradient before the run fails; those that fp16's scaling "
        "of the loss skips do not count",
    )
    max_hours: float | None = option(None, "save and stop after this many hours, for sessions with a time limit")
    max_minutes: float | None = option(None, "the same in minutes; with both, the smaller limit counts")

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint of the lowest validation loss is kept."""
        return self.early_stopping_patience > 0 if self.keep_best is None else self.keep_best

    def __post_init__(self) -> None:
        values = batch.complete(*(getattr(self, name) for name in batch.OPTIONS))
        if self.batch_ramp is not None:  # which says instead how many sequences updates have
            values = self.train_batch_size, self.gradient_accum_step, self.sequences_per_update
        for name, value in zip(batch.OPTIONS, values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def micro_batch_size(self) -> int:
        """Sequences per micro-step, over all devices: --train-batch-size or, while that is still auto, 32."""
        return batch.MICRO_BATCH if self.train_batch_size == "auto" else self.train_batch_size

    @property
    def micro_steps(self) -> int:
        """Micro-steps per update, with --batch-ramp of the largest; of 32 sequences while --train-batch-size is auto."""
        return self.gradient_accum_step or -(-self.sequences // self.micro_batch_size)

    @property
    def sequences(self) -> int:
        """Sequences that an update sees, with --batch-ramp the largest."""
        if self.batch_ramp is not None:
            return max(sequences for _, sequences in parse_ramp(self.batch_ramp))
        return self.sequences_per_update or self.micro_batch_size * self.micro_steps

    def in_updates(self) -> TrainConfig:
        """Return the same with intervals in updates: a share of --train-steps is one update at least."""
        found: dict[str, Any] = {name: getattr(self, name) for name in INTERVALS}
        shares = {name: share for name, share in found.items() if isinstance(share, Share)}
        return dataclasses.replace(
            self, **found | {name: max(1, share.of(self.train_steps)) for name, share in shares.items()}
        )

    def with_micro_batch(self, size: int) -> TrainConfig:
        """Return these options with --train-batch-size `size`, where it was auto. The update stays the same."""
        assert self.train_batch_size == "auto"
        steps = None if self.batch_ramp else self.sequences // size
        return dataclasses.replace(self, train_batch_size=size, gradient_accum_step=steps, sequences_per_update=None)

    def check(self) -> None:
        require_at_least(1, self, "train_steps", "gradient_accum_step", "sequences_per_update", "eval_batch_size")
        if self.train_batch_size != "auto":
            require_at_least(1, self, "train_batch_size")
            require_at_most(_MOST_SEQUENCES, self, "train_batch_size")
        if self.sequences_per_update is not None:
            require_at_most(_MOST_SEQUENCES, self, "sequences_per_update")
        require(
            self.valid_steps == "all" or self.valid_steps > 0,
            f"--valid-steps {self.valid_steps}: choose a number of at least 1, or all",
        )
        require_at_most(_MOST_SEQUENCES, self, "eval_batch_size")
        if self.batch_ramp is not None:
            require(
                self.gradient_accum_step is None,
                f"--batch-ramp and --gradient-accum-step {self.gradient_accum_step} contradict each other: the ramp says "
                "how many sequences an update has; leave one of them out",
            )
            require(
                self.sequences_per_update is None,
                f"--batch-ramp and --sequences-per-update {self.sequences_per_update} contradict each other; leave one of "
                "them out",
            )
            parse_ramp(self.batch_ramp)
        for name in INTERVALS:
            if isinstance(interval := getattr(self, name), Share):
                require(interval.of(10**9) > 0, f"{flag(name)} {interval}: choose a share above 0%, or 0")
            else:
                require_at_least(0, self, name)
        require_at_least(0, self, "saved_checkpoint_limit", "loss_chunks", "skip_nonfinite")
        require_at_least(0, self, "early_stopping_patience", "early_stopping_min_delta", "neftune_alpha")
        require(
            self.valid_interval != 0 or not self.early_stopping_patience,
            f"--early-stopping-patience {self.early_stopping_patience} needs validations on the way; set --valid-interval",
        )
        require(
            self.epochs is None or 0 < self.epochs <= _MOST_EPOCHS,
            f"--epochs {self.epochs}: choose a number above 0 and up to {_MOST_EPOCHS:,}",
        )
        for name in ("max_hours", "max_minutes"):
            limit = getattr(self, name)
            require(limit is None or 0 < limit < math.inf, f"{flag(name)} {limit}: choose a number above 0")


def parse_ramp(entries: Sequence[str]) -> list[tuple[int, int]]:
    """Return (from step, sequences per update) of each entry of --batch-ramp. Raises InputError."""
    shown = f"--batch-ramp {' '.join(entries)}"
    found = [re.fullmatch(r"([0-9]{1,7}):([0-9]{1,15})", entry) for entry in entries]
    for entry, match in zip(entries, found, strict=True):
        require(bool(match), f"--batch-ramp {entry[:80]}: write sequences:from-step, such as 32:0 64:1000 128:4000")
    ramp = [(int(match[2]), int(match[1])) for match in found if match]
    for entry, (_, sequences) in zip(entries, ramp, strict=True):
        require(
            0 < sequences <= _MOST_SEQUENCES, f"--batch-ramp {entry}: choose from 1 to {_MOST_SEQUENCES:,} sequences"
        )
    require(ramp[0][0] == 0, f"{shown}: the first entry must begin at step 0, such as {ramp[0][1]}:0")
    for (before, _), (step, sequences) in itertools.pairwise(ramp):
        require(step > before, f"{shown}: {sequences}:{step} must begin after step {before}; write them in order")
    return ramp
