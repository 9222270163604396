"""Finds where a run begins: with new weights, someone's model, or a checkpoint of a run to resume."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2xla.checkpoint import decay_now, run_folder
from gpt2xla.checkpoint.best import Best, kept_in
from gpt2xla.checkpoint.folder import SHARDS, TRAINING_STATE, is_evaluated, stored_best
from gpt2xla.checkpoint.formats.stored_weights import StoredWeights, parameter_shapes
from gpt2xla.checkpoint.formats.torch_file import is_plain, load_plain
from gpt2xla.checkpoint.loading import build_model, load_weights, locate
from gpt2xla.checkpoint.remote_models import COPIES, fetched
from gpt2xla.checkpoint.resizing import check_ids_of_data, resized
from gpt2xla.checkpoint.seal import COMPLETE, find_damage
from gpt2xla.config import GeneralConfig, ModelConfig, OptimConfig, RunConfig, batch, flag, options_of
from gpt2xla.config.config_file import in_todays_words
from gpt2xla.config.options import require
from gpt2xla.config.paths import best_checkpoint, check_model, check_resumed, is_of_a_step, is_url
from gpt2xla.data.batch_plan import SAVED_SIZES, BatchPlan
from gpt2xla.data.opening import with_epochs, with_row_length, with_vocabulary
from gpt2xla.errors import InputError, user_error
from gpt2xla.files import read_json
from gpt2xla.model.gpt2 import GPT2, blank
from gpt2xla.optim.schedule import changed_decay, check_final_decay, past_decay
from gpt2xla.optim.state import moment_shapes

# Options of this command that a resumed run does not inherit.
_NOT_CONTINUED = {
    "checkpoints_dir", "scratch_dir", "from_checkpoint", "resume", "do_test", "push_to_hub", "max_hours", "max_minutes",
    "wandb_resume_id", "verify_data", "resize_vocab",
}  # fmt: skip
# Those that have a line of their own, or that cannot differ.
_NOT_REPORTED = _NOT_CONTINUED | {"decay_now"} | {f.name for f in options_of(ModelConfig)}
# What torch.amp.GradScaler and the XLA runtime's scaler save.
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
# Model options in which a new run may differ from the checkpoint it starts from.
_RESIZED = ("vocab_size", "seq_length")


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    config: RunConfig  # options that the user did not set come from the checkpoint
    source: Path | None = None  # the checkpoint folder or file; None for new weights
    weights: StoredWeights | None = None  # the source's weights, still on disk; None for new weights
    training: dict[str, Any] | None = None  # what `checkpoint.save` stored; None if a new run begins at step 0
    notes: tuple[str, ...] = ()  # for the user: damaged checkpoints that were skipped, and options that changed

    @property
    def step(self) -> int:
        return self.training["step"] if self.training else 0

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluations after `step` are complete. They are not if the run was stopped during them."""
        return self.source is None or self.training is None or is_evaluated(self.source, self.training)

    @property
    def best(self) -> Best:
        """The best validation so far."""
        return Best(**self.training["best"]) if self.training else Best()

    def without_best(self, why: str) -> Start:
        """Return the same start, where the best validation and the count of early stopping begin again."""
        assert self.training is not None
        notes = self.notes
        if self.best.loss is not None and self.config.train.keeps_best:
            notes = (*notes, f"note: the best validation loss so far, {self.best.loss:.4f}, counts no more: {why}")
        return dataclasses.replace(self, training=self.training | {"best": Best().state()}, notes=notes)

    @property
    def is_finished(self) -> bool:
        """Whether the run has made all its steps and evaluations, or has ended early."""
        train = self.config.train
        has_ended_early = self.step < train.train_steps and self.best.has_ended(train.early_stopping_patience)
        return self.is_evaluated and (0 < self.step == train.train_steps or has_ended_early)

    def build_model(self) -> GPT2:
        """Return the model with its first weights, on the CPU. Raises InputError if they cannot be read."""
        if self.source is not None and self.weights is not None:
            return build_model(self.config.model, self.weights, self.source)
        model = blank(self.config.model)
        model.init_weights(torch.Generator().manual_seed(self.config.general.seed))
        return model


def find_start(config: RunConfig) -> Start:
    """Decide by --resume and --from-checkpoint where the run begins, and load it.

    A resumed run keeps its options, except those that the user sets again. Raises InputError if the requested checkpoint is
    missing, damaged, or contradicts the flags."""
    notes: list[str] = []
    resumed = None
    with user_error(f"--checkpoints-dir {config.general.checkpoints_dir} or --resume {config.general.resume}"):
        config = _resumed_here(config)
        source, continues = _choose(config.general, notes)
    if continues and source:
        config, resumed = _complete(config, source, notes)
    elif not config.general.do_test and config.train.epochs is None:
        config.check_schedule()  # before anything is fetched
    if source is None:
        require(not config.general.resize_vocab, "--resize-vocab needs a model to start from: add --from-checkpoint")
        if not config.general.do_test:
            for complete in (with_vocabulary, with_row_length):
                config, note = complete(config)
                notes += [note] if note else []
        config.model.check()
        _refuse_beyond_memory(config.model)
        if not config.general.do_test:
            config = _on_schedule(config, BatchPlan.of(config.train, devices=1))
            notes += _within_warmup(config)
        return Start(config, notes=tuple(notes))
    if config.general.do_test and config.train.mixed_precision == "auto" and "mixed_precision" not in config.given:
        config = config.in_precision("none")  # so that losses are comparable between devices
    saved_model, weights = load_weights(source)
    notes += weights.notes
    if not config.general.do_test and (continues or not config.general.resize_vocab):
        check_ids_of_data(config, saved_model, source, is_resumed=continues)
    if not continues:
        saved_model, weights, resizing = resized(config, saved_model, weights, source)
        notes += resizing
    config = dataclasses.replace(config, model=_agree(config, saved_model, source))
    training = _load_training_state(source, config) if continues and not config.general.do_test else None
    if not config.general.do_test:
        plan = BatchPlan.of(config.train, devices=1)
        if training and resumed:
            plan = plan.after(BatchPlan.saved(training["data"]), training["step"])
            config = _resumed_schedule(config, plan, resumed, source, training["step"], notes)
        else:
            config = _on_schedule(config, plan)
            notes += _within_warmup(config)
    if training and config.train.keeps_best:
        root, until = config.general.folder, training["step"] - (not is_evaluated(source, training))
        training["best"] = kept_in(root, Best(**training["best"]), until).state()
    return Start(config, source, weights, training, tuple(notes))


def _resumed_here(config: RunConfig) -> RunConfig:
    """Return the run with a path on this machine for --resume if that is a URL, and without the flags of a decay that is
    under way already. What it decays from may be deleted by now."""
    if config.optim.decay_now is not None:
        config = decay_now.without_flags_if_under_way(config)
    if not is_url(url := config.general.resume):
        return config
    copy = fetched(url, "--resume", with_training=not config.general.do_test)
    config = dataclasses.replace(config, general=dataclasses.replace(config.general, resume=str(copy)))
    return config if config.optim.decay_now is None else decay_now.without_flags_if_under_way(config)


def _choose(general: GeneralConfig, notes: list[str]) -> tuple[Path | None, bool]:
    """Return the source, and whether its run is resumed."""
    if general.from_checkpoint is not None:
        check_model("--from-checkpoint", general.from_checkpoint)
    root = general.folder
    named = None if general.resume in ("auto", "never") else best_checkpoint(general.resume) or Path(general.resume)
    is_other_run = general.resume == "never" or (named and named.resolve().parent != root.resolve())
    if is_other_run and not general.do_test and (existing := run_folder.list_checkpoints(root)):
        raise InputError(
            f"--resume {general.resume}: --checkpoints-dir {root} already holds {existing[-1].name} of another run; choose "
            "another folder or move it away"
        )
    if named:
        check_resumed("--resume", str(named))
        return _verified(run_folder.followed(named), f"--resume {named}"), True
    if general.resume == "auto" and not (general.do_test and general.from_checkpoint):
        newest = _newest_good(root, notes)
        if newest is not None:
            _refuse_an_older_one(general, newest)
            return newest, True
    if general.from_checkpoint is None:
        return None, False
    # A model with more ids cannot continue the run that it comes from.
    continues = general.resume != "never" and not general.resize_vocab
    if is_url(general.from_checkpoint):
        is_trained_on = continues and not general.do_test
        source = fetched(general.from_checkpoint, "--from-checkpoint", with_training=is_trained_on)
    else:
        try:
            source = locate(general.from_checkpoint)
        except InputError as error:
            raise InputError(f"--from-checkpoint {error}") from None
    if source.is_file() or not any((source / name).exists() for name in (COMPLETE, TRAINING_STATE)):
        return source, False
    return _verified(source, f"--from-checkpoint {source}"), continues


def _verified(folder: Path, asked: str) -> Path:
    if damage := find_damage(folder):
        inside = run_folder.list_checkpoints(folder)
        fix = f"name one of the run's checkpoints, such as {inside[-1]}" if inside else "choose another checkpoint"
        if COPIES.expanduser() in folder.parents:  # it was whole when it came
            fix = f"delete its copy, {COPIES}/{folder.parent.name}, and start again"
        raise InputError(f"{asked}: {damage}; {fix}")
    return folder


def _newest_good(root: Path, notes: list[str]) -> Path | None:
    for folder in reversed(run_folder.list_folders(root)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        notes.append(f"skipped a checkpoint: {damage}")
    if notes:
        raise InputError(f"no checkpoint in {root} is whole ({notes[0]}); move them away to start from scratch")
    return None


def _refuse_an_older_one(general: GeneralConfig, newest: Path) -> None:
    name = general.from_checkpoint or ""
    if is_url(name):  # the newest of the run's own is here, an older one may not be
        run, _, step = name.rstrip("/").rpartition("/")
        is_older = run == general.checkpoints_dir.rstrip("/") and is_of_a_step(step) and step < newest.name
    else:
        named = best_checkpoint(name) or run_folder.followed(Path(name))
        is_older = named.parent.resolve() == newest.parent.resolve() and named.name != newest.name and named.is_dir()
        name = str(named)
    if is_older:
        raise InputError(
            f"--from-checkpoint {name} is older than {newest.name} beside it; to go back to it, use --resume {name}"
        )


def _complete(config: RunConfig, source: Path, notes: list[str]) -> tuple[RunConfig, RunConfig]:
    """Return `config` with the options that the user did not set taken from the resumed run, and that run's schedule, as a
    run of which the other options are unknown."""
    now, given, options = config.to_flat(), config.given_options(), {}
    try:
        saved = in_todays_words(read_json(source / run_folder.RUN_CONFIG))
        for name, value in saved.items():
            value = tuple(value) if isinstance(value, list) else value
            if isinstance(now.get(name), tuple) and isinstance(value, str):
                value = (value,)  # older checkpoints store a single --train-dir as a string
            saved[name] = value
            if name not in now or name in (*_NOT_CONTINUED, *batch.OPTIONS) or hasattr(ModelConfig, name):
                continue
            if name == "batch_ramp" and value and config.given.intersection(batch.OPTIONS[1:]):
                notes.append(f"changed: --batch-ramp {_as_given(value)} -> not set")
                value = None
            if name not in config.given or (name == "mixed_precision" and now[name] == "auto"):
                options[name] = value
        if "train_steps" in given:
            options["epochs"] = None
        methods = {saved.get("decay_method"), given.get("decay_method", saved.get("decay_method"))}
        if len(methods) > 1 and not methods <= {"cosine", "linear"}:
            options.pop("decay_steps", None)  # which means something else now
        # What follows from --sequences-per-update is asked for with it.
        names = batch.OPTIONS if "sequences_per_update" in config.given else config.given.intersection(batch.OPTIONS)
        sizes = batch.of_resumed_run(saved, {name: now[name] for name in names})
        others = {name: value for name, value in (given | options).items() if name not in batch.OPTIONS}
        if others.get("batch_ramp") and "gradient_accum_step" not in config.given:
            sizes.pop("gradient_accum_step", None)
        completed = RunConfig.from_flat(others | sizes, config.given)
        schedule = {f.name for f in options_of(OptimConfig)} | {"train_steps", "resume"}
        resumed = RunConfig.from_flat({name: value for name, value in saved.items() if name in schedule}, given=())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{source / run_folder.RUN_CONFIG} cannot be used: {error}") from None
    for name, value in completed.to_flat().items():
        is_kept = name not in given or name in options or name in _NOT_REPORTED
        if not is_kept and value != saved.get(name, value):
            notes.append(f"changed: {flag(name)} {_as_given(saved[name])} -> {_as_given(given[name])}")
    asked = completed.optim.optim_type
    trained = saved.get("optim_type", asked)
    if asked != trained and "muon" in (asked, trained) and not config.general.do_test:
        raise InputError(
            f"--optim-type {asked} cannot use the state of {trained} in {source}; leave the flag out, or begin a new run "
            "with its weights (--resume never)"
        )
    return completed, resumed


def _on_schedule(config: RunConfig, plan: BatchPlan, resumed: RunConfig | None = None) -> RunConfig:
    """Return the run with --epochs and shares of the run counted in steps. Raises InputError unless its schedule fits into
    these."""
    config = with_epochs(config, plan)
    config = dataclasses.replace(config, train=config.train.in_updates())
    config.check_schedule(resumed)
    check_final_decay(config.schedule)
    return config


def _resumed_schedule(
    config: RunConfig, plan: BatchPlan, resumed: RunConfig, source: Path, step: int, notes: list[str]
) -> RunConfig:
    """Return the resumed run with its end, which --epochs, --decay-now now or --decay-now earlier may set. Raises InputError
    if its schedule is not one, or cannot follow that of `resumed`."""
    if "decay_now" in config.given:
        config, note = decay_now.begin(config, resumed.schedule, source, step)
        notes.append(note)
    elif resumed.optim.decay_now is not None:
        config = decay_now.continued(config, resumed)
    config = _on_schedule(config, plan, resumed)
    if note := changed_decay(resumed.schedule, config.schedule, step):
        notes.append(note)
    if config.train.train_steps > resumed.train.train_steps and (note := past_decay(config.schedule)):
        notes.append(note)
    elif {"train_steps", "epochs"} & config.given:
        notes += _within_warmup(config)
    return config


def _within_warmup(config: RunConfig) -> list[str]:
    """Return a note if the run, as with noam's default, ends before its warm-up does."""
    warmup = config.schedule.warmup_steps
    assert isinstance(warmup, int)
    if not 0 < warmup >= config.train.train_steps:
        return []
    return [f"note: the run ends within its warm-up of {warmup:,} steps; --warmup-steps changes that"]


def _as_given(value: Any) -> Any:
    return "not set" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else value


def _agree(config: RunConfig, saved: ModelConfig, source: Path) -> ModelConfig:
    """Return the checkpoint's model. Options that the user gave must agree with it, except dropout, which may change."""
    for field in options_of(ModelConfig):
        asked, found = getattr(config.model, field.name), getattr(saved, field.name)
        if field.name in config.given and field.name != "dropout" and asked != found:
            raise InputError(
                f"{flag(field.name)} {asked} contradicts {source}, where it is {found}; leave the flag out or use {found}"
                + (", or begin a new run with its weights (--resume never)" if field.name in _RESIZED else "")
            )
    return dataclasses.replace(saved, dropout=config.model.dropout) if "dropout" in config.given else saved


def _refuse_beyond_memory(model: ModelConfig) -> None:
    """Raise InputError if new weights exceed the memory. The system may promise it anyway, and kill the process later."""
    needed, there = 4 * model.matrix_elements, _memory_bytes()
    if needed > there:
        raise InputError(
            f"--d-model {model.d_model}, --num-layers {model.num_layers}, --vocab-size {model.vocab_size}: the weights take "
            f"{needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f}; choose a smaller model"
        )


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _load_training_state(source: Path, config: RunConfig) -> dict[str, Any]:
    file, moments = source / TRAINING_STATE, moment_shapes(config.optim, parameter_shapes(config.model))
    training = load_plain(file)
    try:
        step, optimizer = training["step"], training["optimizer"]
        if (source / SHARDS).is_dir():
            from gpt2xla.runtime import sharded_state  # whose library takes half a second

            file = source / SHARDS
            optimizer |= sharded_state.load(file, moments)
        found = {key: {name: t.shape for name, t in optimizer[key].items()} for key in moments}
        is_whole = found == moments and all(
            is_plain(t) and t.is_floating_point() for key in moments for t in optimizer[key].values()
        )
        for number in (step, optimizer["step"]):
            is_whole &= type(number) is int and 0 <= number < 2**63
        is_whole &= all(isinstance(value, str | int) for key, value in training["data"].items() if key != SAVED_SIZES)
        BatchPlan.saved(training["data"])
        scaler = training["runtime"].get("scaler", dict.fromkeys(_SCALER, 1))
        is_whole &= scaler.keys() == _SCALER and all(isinstance(value, int | float) for value in scaler.values())
        is_whole &= isinstance(training.setdefault("wandb_id"), str | None)
        skipped = training.setdefault("skipped", 0)
        is_whole &= type(skipped) is int and skipped >= 0
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        is_whole = False
    if not is_whole:
        raise InputError(f"{file} does not hold the state of this model's training; choose another checkpoint")
    training["best"] = stored_best(source, training).state()
    return training
