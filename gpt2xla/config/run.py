"""Every option of a run, as frozen dataclasses. `cli.py` turns them into flags; options are listed nowhere else.

One dataclass is one group of `--help`, and one field made by `option` is one flag: `train_dir` is `--train-dir`. RunConfig,
at the end, puts the groups together. Field names are unique over all groups, so a run is also a flat dictionary, which is
what YAML files and `run_config.json` hold.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt2xla.config import batch, paths
from gpt2xla.config.model import ModelConfig
from gpt2xla.config.optim import DECAY_SHARE, OPEN_ENDED, WARMUP_SHARE, OptimConfig
from gpt2xla.config.options import (
    OFF,
    check_paths,
    check_types,
    flag,
    option,
    options_of,
    require,
    require_at_least,
)  # fmt: skip
from gpt2xla.config.train import Precision, TrainConfig
from gpt2xla.files import folder_name


@dataclass(frozen=True)
class GeneralConfig:
    """General"""

    checkpoints_dir: str = option(
        "./checkpoints",
        "folder for checkpoints, metrics.jsonl, run_config.json; or a URL (gs://bucket/run, s3://, hf://), to which each "
        "checkpoint is sent, and from which any machine resumes",
        is_path=True,
    )
    scratch_dir: str = option(
        "~/.cache/gpt2xla/runs",
        "where a run whose --checkpoints-dir is a URL has its folder on this machine",
        is_path=True,
        check=paths.check_local,
    )
    upload_interval: int = option(
        0,
        "to a URL: send a checkpoint only so many updates after the one before; 0 sends each; the last is always sent",
    )
    grace_seconds: float = option(
        25.0, "to a URL: on SIGTERM, wait so long for the last checkpoint to be sent; spot TPUs give 30 s in all"
    )
    seed: int = option(1061109567, "seed of the initial weights, of dropout and of --shuffle")
    from_checkpoint: str | None = option(
        None,
        "model to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face GPT-2 folder or hub id, a "
        ".safetensors, .pt or llm.c file, or our own checkpoint folder or FOLDER@best, which resumes unless --resume is "
        "never; folders and files may be URLs (gs://, s3://, hf://)",
        is_path=True,
        check=paths.check_model,
        other_names=("model",),
    )
    resume: str = option(
        "auto",
        "auto: resume from the newest checkpoint in --checkpoints-dir; never: start at step 0; or the PATH or URL of a "
        "checkpoint; FOLDER@best is the best one of a run with --keep-best",
        is_path=True,
        check=paths.check_resumed,
        aliases=dict.fromkeys(OFF, "never"),
    )
    resize_vocab: bool = option(
        False,
        "with --from-checkpoint: begin a new run in which tokens that --tokenizer or the data's tokenizer has beyond those "
        "of the model get rows, at first the mean of the others",
    )
    do_test: bool = option(False, "validate on --valid-dir and exit, without training")
    tensorboard_logging: bool = option(False, "also log to --checkpoints-dir/tensorboard, for TensorBoard")
    push_to_hub: str | None = option(
        None,
        "after the last step, push the model to this repository on the Hugging Face hub (owner/name; a new one is private)",
        check=paths.check_hub_name,
    )

    @cached_property
    def folder(self) -> Path:
        """The folder of the run on this machine."""
        if not paths.is_url(self.checkpoints_dir):
            return Path(self.checkpoints_dir)
        return Path(self.scratch_dir).expanduser() / folder_name(self.checkpoints_dir.rstrip("/"))

    @property
    def is_in_bucket(self) -> bool:
        """Whether --checkpoints-dir is a URL."""
        return paths.is_url(self.checkpoints_dir)

    def check(self) -> None:
        require(self.checkpoints_dir != "", "--checkpoints-dir is empty; name a folder")
        require(
            not paths.is_of_a_step(self.checkpoints_dir),
            f"--checkpoints-dir {self.checkpoints_dir}: that is a checkpoint's name; name its run's folder (--resume goes "
            "back to a checkpoint)",
        )
        require(self.scratch_dir != "", "--scratch-dir is empty; name a folder")
        require_at_least(0, self, "upload_interval")
        require(0 <= self.grace_seconds <= 86400, f"--grace-seconds {self.grace_seconds}: choose 0 to 86400")
        require(self.from_checkpoint != "", "--from-checkpoint is empty; name a model, or leave it out")
        require(self.resume != "", "--resume is empty; choose auto, never or the path of a checkpoint")
        require(
            not (self.resize_vocab and self.do_test),
            "--resize-vocab changes the model of a new run, and --do-test trains none; leave one of them out",
        )
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: choose a number from 0 to 2^63 - 1")
        require(
            not self.tensorboard_logging or importlib.util.find_spec("tensorboard") is not None,
            "--tensorboard-logging needs the package tensorboard: pip install 'gpt2xla[tensorboard]', or leave it out "
            "(--no-tensorboard-logging)",
        )


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    train_dir: tuple[str, ...] = option(
        ("./fineweb_10BT/train",),
        "folder of token shards to train on, one with train/ and test/ in it, or its URL (gs://, s3://, hf://datasets/...); "
        "several are mixed by weight: a=0.7 b=0.3",
        is_path=True,
        check=paths.check_mixture,
    )
    valid_dir: str = option(
        "./fineweb_10BT/test",
        "folder or URL of token shards to validate on; if --train-dir has train/ and test/ in it, its test/ by default",
        is_path=True,
        check=paths.check_shards,
    )
    tokenizer: str | None = option(
        None,
        "tokenizer to store with checkpoints: a tiktoken name, 'bytes', a tokenizer.json or its folder, a URL, or a hub id "
        "(default: the one beside the shards)",
        is_path=True,
        check=paths.check_tokenizer,
    )
    shuffle: bool = option(False, "read the windows of each epoch in an order drawn from --seed")
    drop_last: bool = option(
        False, "end each epoch before its last incomplete batch; otherwise that batch continues into the next epoch"
    )
    verify_data: bool = option(False, "before training, compare every shard with the sha256 in its manifest")
    data_cache: str = option(
        "~/.cache/gpt2xla/data", "folder that keeps the shards fetched from URLs", is_path=True, check=paths.check_local
    )
    data_cache_gb: float = option(
        0.0, "size limit of --data-cache in GB; the shards unread for longest are removed first; 0 means no limit"
    )

    def __post_init__(self) -> None:
        if isinstance(self.train_dir, str):  # as in older checkpoints
            object.__setattr__(self, "train_dir", (self.train_dir,))

    def check(self) -> None:
        for name, folders in (("train_dir", self.train_dir), ("valid_dir", (self.valid_dir,))):
            require(all(folders) and folders != (), f"{flag(name)} is empty; name a folder of token shards")
        require(self.data_cache != "", "--data-cache is empty; name a folder")
        require(self.tokenizer != "", "--tokenizer is empty; name one, or leave it out")
        require(0 <= self.data_cache_gb <= 1e9, f"--data-cache-gb {self.data_cache_gb}: choose a number from 0 to 1e9")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases"""

    wandb_logging: bool = option(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = option("gpt2xla", "project name")
    wandb_name: str | None = option(None, "run name")
    wandb_logging_interval: int = option(100, "updates between uploads, which leave no update out")
    wandb_resume_id: str | None = option(None, "id of the run to resume (default: the one in the checkpoint)")
    wandb_notes: str | None = option(None, "notes")
    wandb_tags: str | None = option(None, "tags, separated by commas", joins=True)

    def check(self) -> None:
        require_at_least(1, self, "wandb_logging_interval")


@dataclass(frozen=True)
class RunConfig:
    """All options of one run. `given` names those that the user set by flag, preset, recipe or file; a checkpoint fills the
    rest."""

    general: GeneralConfig = field(default_factory=GeneralConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    given: frozenset[str] = frozenset()

    @cached_property
    def schedule(self) -> OptimConfig:
        """The optimizer's options with warm-up and decay as whole numbers: what was not set follows from --train-steps."""
        return self.optim.over(self.train.train_steps)

    @classmethod
    def from_flat(cls, options: dict[str, Any], given: Collection[str] | None = None) -> RunConfig:
        """Return the run in which `options` are set and all others have their defaults. The user set those in `given`; by
        default, all of `options`. Raises as `check` does."""
        batch.check_given(options)
        groups = {
            name: group(**{f.name: options[f.name] for f in options_of(group) if f.name in options})
            for name, group in GROUPS.items()
        }
        config = cls(**groups, given=frozenset(options if given is None else given))
        config.check()
        return config

    def to_flat(self) -> dict[str, Any]:
        """Return every option by name, as `run_config.json` holds them and `--config` reads them back."""
        counted = {"optim": self.schedule, "train": self.train.in_updates()}
        groups = [counted.get(name, getattr(self, name)) for name in GROUPS]
        return {f.name: getattr(group, f.name) for group in groups for f in options_of(group)}

    def given_options(self) -> dict[str, Any]:
        """Return the options that the user set, by name. A share of the run is still one: the run may get other steps."""
        groups = [getattr(self, name) for name in GROUPS]
        return {f.name: getattr(group, f.name) for group in groups for f in options_of(group) if f.name in self.given}

    def in_precision(self, name: Precision) -> RunConfig:
        """Return the same run, computed in `name`."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, mixed_precision=name))

    def check(self) -> None:
        """Raise InputError for values with which no run can work. The model is checked later, when its checkpoint, if there
        is one, has filled in what was not given; what needs data or devices is checked where they are opened."""
        groups = (self.general, self.data, self.optim, self.train, self.wandb)
        for group in (*groups, self.model):
            check_types(group)
        for group in groups:
            group.check()
        require(
            not (self.data.drop_last and self.train.batch_ramp),
            "--drop-last has no meaning with --batch-ramp, as epochs would end with a micro-batch, which changes; leave "
            "one of them out",
        )
        require(
            not (self.data.drop_last and self.train.epochs and self.train.train_batch_size == "auto"),
            "--epochs with --drop-last, with which epochs end with a micro-batch, needs a --train-batch-size in numbers",
        )
        require(
            not ("early_stopping_min_delta" in self.given and self.train.early_stopping_min_delta > 0)
            or self.train.early_stopping_patience > 0,
            "--early-stopping-min-delta has no meaning without --early-stopping-patience; set that, too, or leave it out",
        )
        self._check_length()

    def _check_length(self) -> None:
        """Raise InputError if several options set the length of the run."""
        given = {name for name, value in self.given_options().items() if value is not None}
        require(
            not {"train_steps", "epochs"} <= given,
            "--train-steps and --epochs both set the run's length; leave one out",
        )
        if "decay_now" in given:
            asked = f"--decay-now {self.optim.decay_now}"
            is_named = self.general.resume not in ("auto", "never") and not self.general.do_test
            require(is_named, f"{asked} continues a run: add --resume PATH, the checkpoint from which it decays")
            for name in ("train_steps", "epochs", "decay_steps"):
                require(name not in given, f"{asked} sets how the run ends; leave {flag(name)} out")

    def check_schedule(self, resumed: RunConfig | None = None) -> None:
        """Raise InputError for a schedule that the user cannot have meant: options that its method does not use, or a
        warm-up and decay that do not fit into the run.

        Args:
            resumed: the run that is resumed. What was good for that one stays."""
        optim, steps = self.schedule, self.train.train_steps
        warmup, decay = optim.warmup_steps, optim.decay_steps
        assert isinstance(warmup, int)
        assert isinstance(decay, int)
        self.optim.check_method(self.given)
        now, before = self.to_flat(), resumed.to_flat() if resumed else {}
        names = ("decay_method", "warmup_steps", "decay_steps")
        changed = {name for name in names if not before or before[name] != now[name]}
        require(
            warmup < steps or "warmup_steps" not in self.given & changed,
            f"--warmup-steps {self.optim.warmup_steps} is not below --train-steps {steps}: the learning rate would never "
            f"reach its peak; use fewer, such as {round(WARMUP_SHARE * steps)}, or leave the flag out",
        )
        if optim.decay_method in OPEN_ENDED:
            require(
                warmup + optim.final_decay <= steps or not optim.final_decay,
                f"--warmup-steps {warmup} and --decay-steps {optim.final_decay} are more than --train-steps {steps} "
                f"together; use fewer, such as --decay-steps {round(DECAY_SHARE * steps)}",
            )
        require(
            optim.decay_method not in ("cosine", "linear") or decay > warmup or not changed,
            f"--decay-steps {decay} must be above --warmup-steps {warmup}"
            + ("" if "warmup_steps" in self.given else f", which is {WARMUP_SHARE:.2%} of --train-steps"),
        )

    def check_early(self) -> None:
        """Raise InputError if a path that the user gave is plainly wrong; where no run can be resumed that has others, also
        for the schedule and the default --train-dir. The programs that train call it before they import torch."""
        general, names = self.general, set(self.given)
        # Whether a run in a bucket is new shows only when the bucket is asked.
        is_new = not general.is_in_bucket and (
            general.from_checkpoint is None and general.resume == "auto" and not general.folder.exists()
        )
        if general.do_test:
            names.discard("train_dir")
        elif is_new:
            if self.train.epochs is None:
                self.check_schedule()
            names.add("train_dir")
        if "decay_now" in names:
            names.discard("resume")  # the run that decays may have deleted it
        for group in (general, self.data, self.train):
            check_paths(group, sorted(names & self.given) + sorted(names - self.given))


GROUPS: dict[str, type] = {
    "general": GeneralConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "wandb": WandbConfig,
}
