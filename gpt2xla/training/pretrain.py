"""From a run's options to its end: find the start, open what the run needs, own its folder, then train or validate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpt2xla.checkpoint.best import prepare_best
from gpt2xla.checkpoint.bucket.arrival import arrive, bring, bucket_error
from gpt2xla.checkpoint.bucket.mirror import Mirror, mirroring, send_tests, send_whole
from gpt2xla.checkpoint.folder import write_run_config
from gpt2xla.checkpoint.publish import not_pushed, push
from gpt2xla.checkpoint.run_folder import list_checkpoints, newest_in_words, prepare_folder, repair_latest, step_folder
from gpt2xla.checkpoint.saver import Saver
from gpt2xla.checkpoint.start import Start, find_start
from gpt2xla.config import RunConfig, TrainConfig
from gpt2xla.config.paths import read_best
from gpt2xla.data.batch_plan import BatchPlan
from gpt2xla.data.opening import MEASURE, TrainingData
from gpt2xla.data.split_folders import with_splits
from gpt2xla.errors import InputError, RunFailed, counted, user_error
from gpt2xla.evals.schedule import Evaluations
from gpt2xla.generation.settings import settings_of
from gpt2xla.hub import repository
from gpt2xla.logs.console import say
from gpt2xla.processes.lease import Standing
from gpt2xla.processes.locks import locked, refuse_if_locked
from gpt2xla.processes.signals import StopSignals
from gpt2xla.runtime import memory
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.leaving import leaving_together
from gpt2xla.runtime.precision import PRECISIONS
from gpt2xla.runtime.stop import Stop
from gpt2xla.storage import Bucket
from gpt2xla.training import micro_batch
from gpt2xla.training.run_log import RunLog
from gpt2xla.training.summary import how_to_continue, print_end, print_start
from gpt2xla.training.train_step import TrainStep
from gpt2xla.training.trainer import Trainer
from gpt2xla.training.validate_only import validate


def pretrain(
    config: RunConfig, make_runtime: Callable[[TrainConfig], Runtime], signals: StopSignals | None = None
) -> None:
    """Train, or with --do-test only validate, as `config` says. Every process calls it.

    Args:
        make_runtime: called once the run's options are complete: a resumed run brings its own.
        signals: if given, SIGTERM and SIGINT end training with a checkpoint, and then the program.

    Raises:
        SystemExit: a signal has ended the run before it was finished; with 128 and its number. Or a save failed,
            and another try did not; with 1. Not without `signals`.
        InputError: data, checkpoint and options do not fit together. Nothing has been written.
        RunFailed: the loss is no longer a number, memory ran out, or a checkpoint cannot be written."""
    if not config.general.do_test:
        with user_error(_flag(config)):
            refuse_if_locked(*_lock(config))  # by a run that is changing what is read now
    bucket, standing = None, Standing()
    if config.general.is_in_bucket:
        bucket = Bucket(config.general.checkpoints_dir, "--checkpoints-dir")
        config, standing = arrive(bucket, config)
    start = find_start(with_splits(config))
    is_chosen_here = start.config.train.mixed_precision == "auto"
    train = start.config.train
    if config.general.do_test:  # a compile, unless asked for, takes longer than most evaluations
        train = dataclasses.replace(train, compile=bool(train.compile))
    runtime = make_runtime(train)
    start = dataclasses.replace(start, config=start.config.in_precision(runtime.precision.name))
    is_finished, code, is_main, general = False, 0, runtime.is_main, start.config.general
    with leaving_together(runtime):
        _check_precision(runtime, is_chosen_here)
        start = _agreed(runtime, config, start, bucket)
        if config.general.do_test:
            validate(start, runtime)
            if bucket and runtime.is_main:
                send_tests(bucket, config.general.folder)
        elif start.is_finished:
            if runtime.is_main:
                with contextlib.ExitStack() as holding:
                    _repair(start, _mirror_of(bucket, start, standing, holding))
                print(f"nothing to do: {how_to_continue(start)}")
            is_finished = True
        else:
            with contextlib.ExitStack() as holding:
                run = _open(start, runtime, signals, holding, partial(_mirror_of, bucket, start, standing, holding))
                del start  # its copies of weights and optimizer state on the host would stay for the whole run
                is_finished, code = run()
    if is_finished and is_main and general.push_to_hub:  # the other processes need not wait for it
        _push(general.folder, general.push_to_hub)
    if code and signals:
        raise SystemExit(code)


def _push(folder: Path, name: str) -> None:
    """Push the run's last checkpoint and, to the branch `best`, its best one if that is another. Raises RunFailed if one
    could not be pushed."""
    newest, best = list_checkpoints(folder)[-1], read_best(folder)
    pushed: list[tuple[Path, str | None]] = [(newest, None)]
    if best and (kept := step_folder(folder, best[0])) != newest:
        pushed.append((kept, "best"))
    for source, branch in pushed:
        try:
            print(f"pushed {source} to {push(source, name, '--push-to-hub', branch=branch)}")
        except InputError as error:  # the login was good when the run began
            raise not_pushed(source, name, str(error)) from None


def _check_precision(runtime: Runtime, is_chosen_here: bool) -> None:
    if is_chosen_here and len(set(runtime.gather(float(PRECISIONS.index(runtime.precision.name))))) > 1:
        raise InputError(
            "--mixed-precision auto: the processes' devices differ, and so do their choices; name one, such as none"
        )


def _agreed(runtime: Runtime, config: RunConfig, start: Start, bucket: Bucket | None) -> Start:
    """Return the start of all processes. Where hosts have different folders, the newest checkpoint of any of them goes to
    the others by way of the bucket."""
    steps = runtime.gather(start.step)
    if bucket and len(set(steps)) > 1:
        newest = max(steps)
        if runtime.rank == steps.index(newest) and start.source:
            with bucket_error(bucket):
                send_whole(bucket, start.source)  # a killed process may not have sent it
        runtime.barrier("the checkpoint is in the bucket")
        if start.step != newest:
            bring(bucket, config.general, (int(newest),))
            again = find_start(with_splits(config))
            start = dataclasses.replace(again, config=again.config.in_precision(runtime.precision.name))
        steps = runtime.gather(start.step)
    if len(set(steps)) > 1:
        fix = "on several hosts it must be one shared folder, or a URL such as gs://bucket/run"
        raise InputError(f"{_flag(start.config)}: processes see different checkpoints; {fix}")
    return start


def _repair(start: Start, mirror: Mirror | None) -> None:
    """Put right what names the checkpoints of a finished run, and send what its bucket lacks."""
    general = start.config.general
    with user_error(_flag(start.config)):
        repair_latest(general.folder, start.step)
        if start.config.train.keeps_best:
            prepare_best(general.folder, start.best)
    if mirror:
        mirror.begin(start.step)
        if not mirror.wait():
            raise RunFailed("the last checkpoint was not sent; fix the error above and rerun the same command")


def _open(
    start: Start,
    runtime: Runtime,
    signals: StopSignals | None,
    holding: contextlib.ExitStack,
    open_mirror: Callable[[Stop], Mirror | None],
) -> Callable[[], tuple[bool, int]]:
    """Open all that training needs, and return the function that trains and tells whether the run is finished, and what its
    exit code is if it is not.

    The run's folder is locked in `holding`, and its bucket by `open_mirror`, which only the main process calls. The folder
    is made only once all of the user's input is known to be right."""
    folder, mirror = start.config.general.folder, None
    data = TrainingData.open(start.config, _plan(start, runtime), start.source, runtime.rank, runtime.world_size)
    config = data.config
    start = dataclasses.replace(start, config=config)
    if start.training and start.source:
        data.check_continues(start.training["data"], start.source)
        if start.training["data"].get(MEASURE, data.measure()) != data.measure():
            start = start.without_best("validation losses are measured otherwise from here on")
    if start.step > config.train.train_steps:
        steps, epochs = config.train.train_steps, config.train.epochs
        asked = (
            f"--train-steps {steps}" if epochs is None else f"--epochs {epochs:g}, which is {counted(steps, 'step')}"
        )
        raise InputError(f"{asked}: {start.source} is already at step {start.step}; raise it")
    settings = settings_of(start.source, data.tokenizer)
    if config.train.train_batch_size == "auto":
        with memory.explain_out_of_memory(runtime, "before the first step", lambda _: memory.SMALLER_MODEL):
            config = micro_batch.choose(config, runtime, data.end_of_text)
        start = dataclasses.replace(start, config=config)
        data = data.in_batches(config, _plan(start, runtime))
    model = start.build_model()
    model.end_of_text = data.end_of_text
    stop = Stop(runtime, signals, config.train, partial(newest_in_words, folder))
    evaluations = Evaluations(config, runtime, model, data, settings, stop, start.best)
    if runtime.is_main:
        if name := config.general.push_to_hub:
            repository(name, "--push-to-hub")
        with user_error(_flag(config)):
            folder.mkdir(parents=True, exist_ok=True)
            holding.enter_context(locked(*_lock(config)))
        mirror = open_mirror(stop)
    with memory.explain_out_of_memory(runtime, "before the first step", lambda _: memory.SMALLER_MODEL):
        train_step = TrainStep(config, runtime, model, start.training)
    if runtime.is_main:
        print_start(start, runtime, data, model)
        best = start.best if config.train.keeps_best else None
        for note in (*prepare_best(folder, best), *prepare_folder(folder, start.step)):
            print(note)
        write_run_config(folder, config)
        if mirror:
            mirror.begin(start.step)
    log = RunLog.open(start, runtime, data, model.flops_per_token(), stop)
    saver = Saver(
        config, runtime, model, train_step.optimizer, data.tokenizer, settings,
        lambda: {"data": data.position(), "best": evaluations.best.state(), **log.state()}, stop,
        mirror,
    )  # fmt: skip
    trainer = Trainer(config.train, runtime, data.order, train_step, evaluations, saver, log, stop)
    first_step, is_evaluated = start.step, start.is_evaluated

    def run() -> tuple[bool, int]:
        step, is_complete = trainer.run(first_step, is_evaluated)
        is_finished = is_complete and (step == config.train.train_steps or evaluations.have_ended_run)
        if runtime.is_main:
            reason = "" if is_finished else stop.reason or "another process"
            print_end(config, step, reason, evaluations.validation, evaluations.best)
        return is_finished, 0 if is_finished else stop.exit_code

    return run


def _mirror_of(
    bucket: Bucket | None, start: Start, seen: Standing, holding: contextlib.ExitStack, stop: Stop | None = None
) -> Mirror | None:
    """Return what sends the run to its bucket, until the end of `holding`; None if it has no bucket."""
    if bucket is None:
        return None

    def lost(problem: str) -> None:
        say(problem, error=True)
        if stop:
            stop.request("another run, which has taken over")

    mirror = holding.enter_context(mirroring(bucket, start.config, seen, lost))
    if stop:
        stop.newest = mirror.safe_in_words
    return mirror


def _plan(start: Start, runtime: Runtime) -> BatchPlan:
    plan = BatchPlan.of(start.config.train, runtime.devices)
    return plan.after(BatchPlan.saved(start.training["data"]), start.step) if start.training else plan


def _lock(config: RunConfig) -> tuple[Path, str]:
    return config.general.folder / ".lock", _flag(config)


def _flag(config: RunConfig) -> str:
    return f"--checkpoints-dir {config.general.checkpoints_dir}"
