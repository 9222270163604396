"""The training loop, the same on every device. What differs between devices is behind `runtime.base.Runtime`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint.saver import BackgroundSaves
from gpt2xla.checkpoint.start import Start, find_start
from gpt2xla.config import RunConfig, TrainConfig
from gpt2xla.data.mixture import PATTERN
from gpt2xla.data.opening import check_same_tokenizer, open_training, open_validation
from gpt2xla.data.tokenizer import Tokenizer, match_tokenizer
from gpt2xla.data.windows import TrainingOrder, Windows, share_of
from gpt2xla.errors import InputError, RunFailed, user_error
from gpt2xla.evals.hellaswag import HellaSwag, Questions, encode_items, read_items
from gpt2xla.evals.samples import Sampler
from gpt2xla.evals.validation import Validation, Validator
from gpt2xla.generation.settings import settings_of
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import METRICS_FILE, TEST_FILE, ConsoleSink, JsonlSink, Sink, Throughput, perplexity
from gpt2xla.logs.wandb_sink import WandbSink
from gpt2xla.optim.state import MOMENTS, export_state
from gpt2xla.processes.locks import locked, refuse_if_locked
from gpt2xla.processes.signals import StopSignals
from gpt2xla.runtime import memory
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.leaving import leaving_together
from gpt2xla.runtime.precision import PRECISIONS
from gpt2xla.runtime.stop import Stop, Stopped
from gpt2xla.training.summary import summary
from gpt2xla.training.train_step import TrainStep

_MOST_OVERFLOWS = 40  # in a row; as many halvings take fp16's first scale from 65536 to 6e-8


def pretrain(
    config: RunConfig, make_runtime: Callable[[TrainConfig], Runtime], signals: StopSignals | None = None
) -> None:
    """Train, or with --do-test only validate, as `config` says. Every process calls it.

    The runtime is made when the run's options are known: a continued run brings its own. With `signals`, SIGTERM and SIGINT
    end training with a checkpoint.

    Raises:
        InputError: before the first step, when data, checkpoint and options do not fit together.
        RunFailed: the loss is no longer a number, or a checkpoint cannot be written.
    """
    if not config.general.do_test:
        with user_error(f"--checkpoints-dir {config.general.checkpoints_dir}"):
            refuse_if_locked(*_lock(config))  # by a run that is changing what is read now
    start = find_start(config)
    runtime = make_runtime(start.config.train)
    is_chosen_here = start.config.train.mixed_precision == "auto"
    start = dataclasses.replace(start, config=start.config.in_precision(runtime.precision.name))
    with leaving_together(runtime):
        if is_chosen_here and len(set(runtime.gather(float(PRECISIONS.index(runtime.precision.name))))) > 1:
            raise InputError(
                "--mixed-precision auto: the processes' devices differ, and so do their choices; name one, such as none"
            )
        if len(set(runtime.gather(start.step))) > 1:
            raise InputError(
                f"--checkpoints-dir {config.general.checkpoints_dir}: processes see different checkpoints; on several hosts "
                "it must be one shared folder"
            )
        if config.general.do_test:
            test(start, runtime)
        elif start.step and start.step == start.config.train.train_steps and start.is_evaluated:
            if runtime.is_main:
                print(f"nothing to do: {start.source} is the end of the run; raise --train-steps to go on")
        else:
            trainer = Trainer(start, runtime, signals)
            del start  # host copies of weights and optimizer state, which would stay for the whole run
            trainer.run()


def _lock(config: RunConfig) -> tuple[Path, str]:
    folder = Path(config.general.checkpoints_dir)
    return folder / ".lock", f"--checkpoints-dir {folder}"


def test(start: Start, runtime: Runtime) -> None:
    """Print loss and perplexity of the checkpoint on the validation split. If --checkpoints-dir was given or exists, they
    are added to its test.jsonl; a run's own log stays as it is."""
    if start.source is None:
        raise InputError("--do-test: there is no checkpoint to test; name one with --from-checkpoint")
    config = start.config
    windows = open_validation(config)
    _match_tokenizer(config, [start.source], [windows])
    model = start.build_model()
    with explained_evaluation(runtime, config.train, "validation"):
        runtime.setup_model(model)
        result = Validator(config, windows, model, runtime).run()
    if runtime.is_main:
        for note in windows.stream.notes:
            print(note)
        print(f"{start.source}: {result}; the split has {windows.stream.length - 1:,} to predict")
        _log_test(config, start.source, result)


def explained_evaluation(runtime: Runtime, train: TrainConfig, name: str) -> contextlib.AbstractContextManager[None]:
    return memory.explain_out_of_memory(
        runtime, f"in {name}", lambda _: memory.eval_advice(train, runtime.devices, name)
    )


def _log_test(config: RunConfig, source: Path, result: Validation) -> None:
    folder = Path(config.general.checkpoints_dir)
    line = {
        "step": checkpoint.step_of(source),
        "checkpoint": str(source),
        "valid_dir": config.data.valid_dir,
    }
    line |= result.line() | {"valid_perplexity": perplexity(result.loss), "time": time.time()}
    sinks: list[Sink] = []
    if "checkpoints_dir" in config.given or folder.is_dir():
        with user_error(f"--checkpoints-dir {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            sinks.append(JsonlSink(folder / TEST_FILE))
    if config.wandb.wandb_logging:
        sinks.append(WandbSink(config, folder, None))
    for sink in sinks:
        sink.write(line)
        sink.close()


class Trainer:
    """One training run on one process."""

    def __init__(self, start: Start, runtime: Runtime, signals: StopSignals | None) -> None:
        self.config = config = start.config
        self.runtime = runtime
        train = config.train
        sets, mixture = open_training(config)
        self.valid_windows = open_validation(config)
        self.per_device = share_of("--train-batch-size", train.train_batch_size, runtime.devices)
        self.order = TrainingOrder(
            sets,
            mixture,
            batch_size=train.train_batch_size,
            accum=train.gradient_accum_step,
            rank=runtime.rank,
            world_size=runtime.world_size,
            drop_last=config.data.drop_last,
            shuffle_seed=config.general.seed if config.data.shuffle else None,
        )
        folders = [*([start.source] if start.source else []), *(windows.stream.folder for windows in sets)]
        self.tokenizer = _match_tokenizer(config, folders, [*sets, self.valid_windows])
        self.generation = settings_of(start.source, self.tokenizer)
        self.sequences_per_step = train.train_batch_size * train.gradient_accum_step
        self.tokens_per_step = self.sequences_per_step * config.model.seq_length
        self._check_continues_same_data(start)
        questions = self._hellaswag_questions()
        self.folder = Path(config.general.checkpoints_dir)
        self.model = start.build_model()
        self.holding = contextlib.ExitStack()
        if runtime.is_main:
            with user_error(f"--checkpoints-dir {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.holding.enter_context(locked(*_lock(config)))
        self.stop = Stop(runtime, signals, train.max_hours)
        self.saves = BackgroundSaves(self._save_failed)
        self.skipped = start.training["skipped"] if start.training else 0
        self.overflows = 0  # in a row

        with memory.explain_out_of_memory(runtime, "before the first step", lambda _: memory.SMALLER_MODEL):
            self.train_step = TrainStep(config, runtime, self.model, start.training, self.stop, self._log_training)
        self.validator = Validator(config, self.valid_windows, self.model, runtime, stop=self.stop)
        self.validation: Validation | None = None
        self.hellaswag = questions and HellaSwag(questions, self.model, runtime, train.eval_batch_size, self.stop)
        self.sampler = (
            Sampler(config, self.model, self.tokenizer, self.generation, runtime) if train.sample_interval else None
        )
        self.first_step, self.is_evaluated = start.step, start.is_evaluated
        self.throughput = Throughput(self.tokens_per_step, self.model.flops_per_token(), runtime.peak_flops())
        self.wandb: WandbSink | None = None
        self.sinks: list[Sink] = []
        if runtime.is_main:
            self._print_summary(start)
            self._open_sinks(start)

    def run(self) -> None:
        with self.holding:
            try:
                step = self._loop()
            finally:
                is_saved = self.saves.wait()
                for sink in self.sinks:
                    sink.close()
        self.runtime.barrier("saved")
        if not is_saved:
            raise RunFailed(f"step {step} was not saved; fix the error above, and start the same command again")
        if self.runtime.is_main:
            self._print_end(step)

    def _loop(self) -> int:
        """Train to the last step, or until all processes agree to stop: the step reached."""
        config, runtime = self.config.train, self.runtime
        train_step = runtime.compile_step(self.train_step, "training step")
        step, stopping = self.first_step, False
        self.model.train()
        if not self.is_evaluated:
            stopping = not self._evaluate(step)
            with runtime.part("saving"):
                self._save(step, is_evaluated=not stopping)
        batches = runtime.device_batches(self.order.batches(step))
        self.throughput.restart()
        while step < config.train_steps and not stopping:
            with memory.explain_out_of_memory(runtime, f"in step {step + 1}", self._smaller_batch):
                train_step(batches, step)
                step += 1
                if step == self.first_step + 1:
                    # This one compiled where anything is compiled: the clock starts after it.
                    runtime.wait()
                    self.throughput.restart()

            is_evaluated = not self.stop.agreed() and self._evaluate(step)
            stopping = not is_evaluated
            if stopping or self._is_due(config.save_interval, step):
                with runtime.part("saving"):
                    self._save(step, is_evaluated)
                self.throughput.restart()
        runtime.wait()
        return step

    def _smaller_batch(self, shortage: memory.Shortage) -> str:
        step, runtime = self.train_step, self.runtime
        return memory.train_advice(
            shortage,
            self.config.train,
            runtime.devices,
            self.model.num_parameters(),
            lambda sequences: runtime.has_memory_for(partial(step.rehearse, sequences)),
        )

    def _is_due(self, interval: int, step: int) -> bool:
        return step == self.config.train.train_steps or bool(interval and step % interval == 0)

    def _evaluate(self, step: int) -> bool:
        """Do what is due after `step`. False if all processes agreed to stop meanwhile."""
        config = self.config.train
        evaluations = (
            ("validation", self._validate, self._is_due(config.valid_interval, step)),
            ("HellaSwag", self._evaluate_hellaswag, self.hellaswag and self._is_due(config.hellaswag_interval, step)),
            ("sampling", self._sample, self.sampler and self._is_due(config.sample_interval, step)),
        )
        for name, evaluate, is_due in evaluations:
            if is_due:
                self.runtime.wait()
                try:
                    with self.runtime.part(name), explained_evaluation(self.runtime, config, name):
                        self._log({"step": step, "tokens": step * self.tokens_per_step} | evaluate())
                except Stopped:
                    return False
                self.throughput.restart()
        return True

    def _validate(self) -> dict[str, Any]:
        self.validation = self.validator.run()
        return self.validation.line()

    def _evaluate_hellaswag(self) -> dict[str, Any]:
        assert self.hellaswag
        return self.hellaswag.run().line()

    def _sample(self) -> dict[str, Any]:
        assert self.sampler
        return {"sample": self.sampler.run()}

    def _log_training(self, step: int, lr: float) -> Callable[[float, float], None]:
        trace_ms = self.runtime.trace_ms()

        def log(loss: float, grad_norm: float) -> None:
            self._count_skipped(step, loss, grad_norm)
            self._log(
                {"step": step, "tokens": step * self.tokens_per_step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
                | self.throughput.step()
                | {
                    "compiles": self.runtime.compiles(),
                    "trace_ms": trace_ms,
                    "skipped": self.skipped,
                    "time": time.time(),
                }
            )

        return log

    def _count_skipped(self, step: int, loss: float, grad_norm: float) -> None:
        """Every process sees the same values and fails at the same step; as a save waits for all counts before it, nothing
        is saved after. With fp16 the scaler skips an update whose gradient overflowed, which is no fault, and halves its
        scale: after many in a row the scale is not what is wrong."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.overflows = 0
            return
        self.overflows += 1
        is_fp16 = self.config.train.mixed_precision == "fp16"
        if math.isfinite(loss) and is_fp16 and self.overflows <= _MOST_OVERFLOWS:
            return
        self.skipped += 1
        if self.skipped > self.config.train.skip_nonfinite:
            raise RunFailed(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: the run has diverged. It read "
                f"{self.order.describe(step - 1)}; this update was not made, and checkpoints from before are good: start "
                "again with a lower --learning-rate, from one of them with --resume, or leave more such updates out with "
                "--skip-nonfinite"
            )

    def _save(self, step: int, is_evaluated: bool) -> None:
        self.runtime.wait()
        optimizer = export_state(self.model, self.train_step.optimizer)
        shards = checkpoint.shards_folder(self.folder, step)
        weights = self.runtime.to_host(self.model.state_dict())
        moments = self.runtime.save_shards({key: optimizer[key] for key in MOMENTS if key in optimizer}, shards)
        updates = self.runtime.to_host({"step": optimizer["step"]})
        self.runtime.barrier("shards are written")
        if self.runtime.is_main:
            training = {
                "step": step,
                "is_evaluated": is_evaluated,
                "optimizer": {"step": int(updates["step"].item()), **moments},
                "runtime": self.runtime.state_dict(),
                "data": self._data_position(),
                "wandb_id": self.wandb.run_id if self.wandb else None,
                "skipped": self.skipped,
            }
            self.saves.start(partial(self._write_checkpoint, weights, training, shards))

    def _write_checkpoint(self, weights: dict[str, Tensor], training: dict[str, Any], shards: Path) -> None:
        folder = checkpoint.save(
            self.folder, config=self.config, weights=weights, training=training, tokenizer=self.tokenizer,
            settings=self.generation, shards=shards,
        )  # fmt: skip
        checkpoint.prune(self.folder, folder, self.config.train.saved_checkpoint_limit)

    def _save_failed(self, error: OSError) -> None:
        goes_on = self.config.train.on_save_error == "go-on"
        say(f"{error}; older checkpoints are good; training {'goes on' if goes_on else 'stops'}", error=True)
        if not goes_on:
            self.stop.request("a checkpoint that could not be written")

    def _log(self, line: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(line)

    def _open_sinks(self, start: Start) -> None:
        for note in checkpoint.prepare_folder(self.folder, start.step):
            print(note)
        checkpoint.write_run_config(self.folder, self.config)
        self.sinks = [
            JsonlSink(self.folder / METRICS_FILE, start.step, start.is_evaluated),
            ConsoleSink(start.step, self.config.train.train_steps),
        ]
        if self.config.wandb.wandb_logging:
            self.wandb = WandbSink(self.config, self.folder, start.training["wandb_id"] if start.training else None)
            self.sinks.append(self.wandb)

    def _print_end(self, step: int) -> None:
        if step < self.config.train.train_steps:
            print(
                f"stopped by {self.stop.reason or 'another process'} after step {step}; the same command goes on from there"
            )
        elif self.validation:
            loss = self.validation.loss
            print(f"done: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
        print(f"checkpoint: {self.folder / f'step-{step:08d}'}")

    def _print_summary(self, start: Start) -> None:
        model, runtime = self.config.model, self.runtime
        streams = [windows.stream for windows in (*self.order.sets, self.valid_windows)]
        for note in (*start.notes, *(note for stream in streams for note in stream.notes)):
            print(note)
        if start.training:
            print(f"going on from {start.source} after step {start.step}")
        elif start.source:
            print(f"weights from {start.source}; the run starts at step 0")
        for name, text in summary(self, start).items():
            print(f"{name:>10}: {text}", flush=True)
        free, parameters = runtime.free_memory(), self.model.num_parameters()
        if warning := memory.host_warning(model, self.config.train, parameters, free, runtime.devices):
            say(warning, error=True)

    def _data_position(self) -> dict[str, Any]:
        """What decides which windows a step reads: all of it must stay the same for a resumed run to go on exactly."""
        return {
            "--train-dir": self._data_fingerprint(),
            "--seq-length": self.config.model.seq_length,
            "--train-batch-size x --gradient-accum-step": self.sequences_per_step,
            "--drop-last": sum(order.per_epoch for order in self.order.epochs),
            "--shuffle or --seed": f"--seed {self.config.general.seed}" if self.config.data.shuffle else "no --shuffle",
        }

    def _data_fingerprint(self) -> str:
        """Also of the weights, where there are several data sets; their names and places may change."""
        sets, counts = self.order.sets, self.order.mixture.counts
        if len(sets) == 1:
            return sets[0].stream.fingerprint
        return " + ".join(f"{c}/{PATTERN} of {w.stream.fingerprint}" for w, c in zip(sets, counts, strict=True))

    def _hellaswag_questions(self) -> Questions | None:
        """Read before the first step, so that what is wrong with them shows at once."""
        train = self.config.train
        if not train.hellaswag_interval:
            return None
        if self.tokenizer is None:
            raise InputError(
                f"--hellaswag-interval {train.hellaswag_interval} needs a tokenizer, and none lies beside the shards; name "
                "theirs with --tokenizer"
            )
        items = read_items(train.hellaswag_data, "--hellaswag-data")
        return encode_items(items, self.tokenizer, self.config.model.seq_length)

    def _check_continues_same_data(self, start: Start) -> None:
        saved = start.training["data"] if start.training else {}
        for option, value in self._data_position().items():
            if saved.get(option, value) != value:
                raise InputError(
                    f"{option} is not what {start.source} was trained with ({saved[option]}, now {value}): the run would "
                    "lose or repeat data; restore it, or start anew with --from-checkpoint and --resume never"
                )
        if start.step > self.config.train.train_steps:
            raise InputError(
                f"--train-steps {self.config.train.train_steps}: {start.source} is already at step {start.step}; raise it"
            )


def _match_tokenizer(config: RunConfig, folders: list[Path], windows: list[Windows]) -> Tokenizer | None:
    check_same_tokenizer(windows)
    manifests = [w.stream.manifest for w in windows if w.stream.manifest]
    return match_tokenizer(config.data.tokenizer, folders, manifests, config.model.real_vocab_size)
