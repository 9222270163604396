"""Every option of a run, as frozen dataclasses. `cli.py` turns them into flags; options are listed nowhere else.

One dataclass is one group of `--help`, and one field made by `option` is one flag: `train_dir` is `--train-dir`. RunConfig,
at the end, puts the groups together. Field names are unique over all groups, so a run is also a flat dictionary, which is
what YAML files and `run_config.json` hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpt2xla.config import paths
from gpt2xla.config.options import (
    check_paths,
    check_types,
    flag,
    option,
    options_of,
    require,
    require_at_least,
    require_at_most,
)  # fmt: skip

# A larger number is a slip: no machine holds so much, and it could take hours to find that out.
_MOST_PARAMETERS = 2**40
_MOST_LAYERS = 10_000
_MOST_SEQUENCES = 2**20
_WARMUP_SHARE = 0.0375
_NOAM_WARMUP = 750  # which is a factor of its peak, so it does not follow the run's length

Preset = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
Precision = Literal["auto", "none", "bf16", "fp16"]

_OFF = ("no", "off", "false")  # YAML 1.1 reads the first two as the third
PRECISION_ALIASES = dict.fromkeys(("fp32", *_OFF), "none")

# Help texts of programs that take a trained model and its tokenizer.
MODEL_HELP = "checkpoint folder, gpt2 ... gpt2-xl, a hub id, or a .safetensors, .pt or llm.c file"
TOKENIZER_HELP = (
    "a tiktoken name such as gpt2, 'bytes', a tokenizer.json, the folder of any tokenizer that transformers reads, or a "
    "hub id"
)

# The four sizes that OpenAI published: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "vocab_size": 50257, "seq_length": 1024, "d_model": d_model, "num_layers": num_layers, "num_heads": num_heads,
        "d_ff": 4 * d_model, "activation": "gelu-tanh", "tie_weights": True, "bias": True, "layer_norm_eps": 1e-5,
    }
    for name, d_model, num_layers, num_heads in (
        ("gpt2", 768, 12, 12),
        ("gpt2-medium", 1024, 24, 16),
        ("gpt2-large", 1280, 36, 20),
        ("gpt2-xl", 1600, 48, 25),
    )
}  # fmt: skip


@dataclass(frozen=True)
class GeneralConfig:
    """General"""

    checkpoints_dir: str = option(
        "./checkpoints", "folder for checkpoints, metrics.jsonl, run_config.json", is_path=True
    )
    seed: int = option(1061109567, "seed of the initial weights, of dropout and of --shuffle")
    from_checkpoint: str | None = option(
        None,
        "model to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face GPT-2 folder or hub id, a "
        ".safetensors, .pt or llm.c file, or our own checkpoint folder, which resumes unless --resume is never",
        is_path=True,
        check=paths.check_model,
        other_names=("model",),
    )
    resume: str = option(
        "auto",
        "auto: resume from the newest checkpoint in --checkpoints-dir; never: start at step 0; or the PATH of a checkpoint",
        is_path=True,
        check=paths.check_resumed,
        aliases=dict.fromkeys(_OFF, "never"),
    )
    do_test: bool = option(False, "validate on --valid-dir and exit, without training")

    def check(self) -> None:
        require(self.checkpoints_dir != "", "--checkpoints-dir is empty; name a folder")
        require(self.from_checkpoint != "", "--from-checkpoint is empty; name a model, or leave it out")
        require(self.resume != "", "--resume is empty; choose auto, never or the path of a checkpoint")
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: choose a number from 0 to 2^63 - 1")


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
        "tokenizer to store with checkpoints: a tiktoken name, 'bytes', a tokenizer.json or its folder, or a hub id "
        "(default: the one beside the shards)",
        is_path=True,
        check=paths.check_tokenizer,
    )
    shuffle: bool = option(False, "read the windows of each epoch in an order drawn from --seed")
    drop_last: bool = option(
        False, "end each epoch before its last incomplete batch; otherwise that batch continues into the next epoch"
    )
    verify_data: bool = option(False, "before training, compare every shard with the sha256 in its manifest")
    data_cache: str = option("~/.cache/gpt2xla/data", "folder that keeps the shards fetched from URLs", is_path=True)
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
class ModelConfig:
    """Model"""

    vocab_size: int = option(
        50304,
        "number of token ids; a new model has by default as many as its data's manifest or tokenizer says, rounded up to a "
        "multiple of 128; 50304, which is GPT-2's 50257 rounded up, pads a checkpoint with 50257",
    )
    seq_length: int = option(
        1024, "longest sequence, in tokens; a smaller one than a checkpoint's cuts its position embeddings"
    )
    d_model: int = option(768, "width of the residual stream")
    num_layers: int = option(12, "number of transformer blocks")
    num_heads: int = option(12, "attention heads per block; must divide --d-model")
    d_ff: int = option(0, "width of the feed-forward layers; 0 means 4 x --d-model")
    dropout: float = option(0.0, "dropout probability of embeddings, attention and residual branches")
    activation: Literal["gelu-tanh", "gelu-exact", "relu"] = option(
        "gelu-tanh",
        "gelu and gelu-tanh are GPT-2's tanh approximation; gelu-exact uses erf",
        aliases={"gelu": "gelu-tanh"},
    )
    tie_weights: bool = option(True, "use the token embedding as the output head, as GPT-2 does")
    bias: bool = option(True, "use biases in linear layers and layer norms, as GPT-2 does")
    layer_norm_eps: float = option(1e-5, "epsilon inside layer norms")
    # Not a flag: how many of the last ids only round a checkpoint's vocabulary up. They have no tokens, zero embeddings and
    # no probability. In a model trained here from scratch all ids count.
    vocab_padding: int = 0

    def __post_init__(self) -> None:
        if self.d_ff == 0:
            object.__setattr__(self, "d_ff", 4 * self.d_model)

    @property
    def real_vocab_size(self) -> int:
        """The number of ids that may occur in data and be predicted."""
        return self.vocab_size - self.vocab_padding

    @property
    def matrix_elements(self) -> int:
        """How many numbers the matrices of embeddings and blocks hold. It estimates the parameters before there is a model;
        biases and layer norms add next to nothing."""
        return self.d_model * (self.vocab_size + self.seq_length + self.num_layers * (4 * self.d_model + 2 * self.d_ff))

    def check(self) -> None:
        check_types(self)
        require_at_least(1, self, "vocab_size", "seq_length", "d_model", "num_layers", "num_heads", "d_ff")
        require(0 <= self.vocab_padding < self.vocab_size, f"--vocab-size {self.vocab_size} is all padding")
        require_at_most(_MOST_LAYERS, self, "num_layers")
        require(
            self.matrix_elements <= _MOST_PARAMETERS,
            f"--d-model {self.d_model}, --d-ff {self.d_ff}, --vocab-size {self.vocab_size}, --seq-length {self.seq_length}: "
            f"that is a model of {self.matrix_elements:.1e} parameters; choose a smaller one",
        )
        require(
            self.d_model % self.num_heads == 0,
            f"--num-heads {self.num_heads} does not divide --d-model {self.d_model}; choose one that does",
        )
        require(0 <= self.dropout < 1, f"--dropout {self.dropout}: choose a probability of at least 0 and below 1")
        require(0 < self.layer_norm_eps < 1, f"--layer-norm-eps {self.layer_norm_eps}: choose a small number above 0")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer"""

    optim_type: Literal["adam", "adamw", "muon"] = option(
        "adamw",
        "adam adds --weight-decay to the gradient; adamw decays the weights; muon makes the updates of the blocks' matrices "
        "orthogonal and uses adamw for the rest",
    )
    learning_rate: float = option(6e-4, "peak learning rate (noam: the factor of the formula)")
    betas: tuple[float, float] = option((0.9, 0.95), "decay rates of Adam's two averages")
    weight_decay: float = option(0.1, "weight decay of matrices and embeddings; biases and layer norms have none")
    decay_method: Literal["cosine", "noam"] = option("cosine", "shape of the schedule after the warm-up")
    warmup_steps: int | None = option(None, "steps of linear warm-up (default: 3.75% of --train-steps; noam: 750)")
    min_lr: float = option(6e-5, "cosine: the final learning rate, from --decay-steps on")
    decay_steps: int | None = option(
        None, "cosine: the step at which --min-lr is reached, warm-up included (default: --train-steps)"
    )
    max_grad_norm: float = option(1.0, "clip the norm of the whole gradient to this; 0 means no clipping")

    def check(self) -> None:
        require_at_least(0, self, "learning_rate", "weight_decay", "min_lr", "max_grad_norm", "warmup_steps")
        for beta in self.betas:
            require(0 <= beta < 1, f"--betas {self.betas[0]} {self.betas[1]}: each must be at least 0 and below 1")
        require(
            self.decay_method != "cosine" or self.min_lr <= self.learning_rate,
            f"--min-lr {self.min_lr} is above --learning-rate {self.learning_rate}; lower it",
        )

    def over(self, steps: int) -> OptimConfig:
        """Return the same with the warm-up and decay that a run of so many steps has by default. The shares are those of the
        published recipe: 750 and 20,000 of 20,000."""
        share = _NOAM_WARMUP if self.decay_method == "noam" else round(_WARMUP_SHARE * steps)
        warmup = share if self.warmup_steps is None else self.warmup_steps
        decay = steps if self.decay_steps is None else self.decay_steps
        return dataclasses.replace(self, warmup_steps=warmup, decay_steps=decay)


@dataclass(frozen=True)
class TrainConfig:
    """Training"""

    train_steps: int = option(20_000, "optimizer updates in the whole run")
    train_batch_size: int = option(32, "sequences per micro-step, over all devices together")
    gradient_accum_step: int = option(8, "micro-steps per optimizer update")
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
    activation_checkpointing: Literal["none", "block"] = option(
        "none",
        "block: keep only each block's input for the backward pass, and compute the rest again; none: keep everything",
        aliases=dict.fromkeys(_OFF, "none"),
    )
    compile: bool | None = option(
        None,
        "torch.compile the blocks (default: in long runs, where the device has no fused blocks); XLA always compiles",
    )
    eval_batch_size: int = option(32, "sequences per validation batch, over all devices together")
    valid_steps: int | Literal["all"] = option(
        100, "validation batches, or fewer if the split ends first; all: each token of the split once"
    )
    valid_interval: int = option(500, "updates between validations; 0 means only at the end")
    hellaswag_interval: int = option(0, "updates between HellaSwag evaluations, with one more at the end; 0 means none")
    hellaswag_data: str | None = option(
        None, "HellaSwag's items, JSON lines (default: the hub's 10,042)", is_path=True, check=paths.check_file
    )
    sample_interval: int = option(0, "updates between sample texts that the model writes; 0 means none")
    sample_prompt: str = option("", "text that the samples continue (default: they begin after an end-of-text token)")
    special_tokens_in_text: Literal["as-text", "as-ids", "refuse"] = option(
        "as-text",
        "how to read special tokens spelled in --sample-prompt: as-text takes the letters, as-ids takes the tokens, refuse "
        "stops the run",
    )
    save_interval: int = option(1000, "updates between checkpoints; 0 means only at the end")
    saved_checkpoint_limit: int = option(6, "how many of the newest checkpoints to keep; 0 keeps all")
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

    def check(self) -> None:
        require_at_least(1, self, "train_steps", "train_batch_size", "gradient_accum_step", "eval_batch_size")
        require(
            self.valid_steps == "all" or self.valid_steps > 0,
            f"--valid-steps {self.valid_steps}: choose a number of at least 1, or all",
        )
        require_at_most(_MOST_SEQUENCES, self, "train_batch_size", "eval_batch_size")
        intervals = ("valid_interval", "hellaswag_interval", "sample_interval", "save_interval")
        require_at_least(0, self, *intervals, "saved_checkpoint_limit", "loss_chunks", "skip_nonfinite")
        for name in ("max_hours", "max_minutes"):
            limit = getattr(self, name)
            require(limit is None or 0 < limit < math.inf, f"{flag(name)} {limit}: choose a number above 0")


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
    """All options of one run. `given` names those that the user set by flag, preset or file; a checkpoint fills the rest.

    Warm-up and decay are numbers here: what was not set follows from --train-steps."""

    general: GeneralConfig = field(default_factory=GeneralConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "optim", self.optim.over(self.train.train_steps))

    @classmethod
    def from_flat(cls, options: dict[str, Any], given: Collection[str] | None = None) -> RunConfig:
        """Return the run in which `options` are set and all others have their defaults. The user set those in `given`; by
        default, all of `options`. Raises as `check` does."""
        groups = {
            name: group(**{f.name: options[f.name] for f in options_of(group) if f.name in options})
            for name, group in GROUPS.items()
        }
        config = cls(**groups, given=frozenset(options if given is None else given))
        config.check()
        return config

    def to_flat(self) -> dict[str, Any]:
        """Return every option by name, as `run_config.json` holds them and `--config` reads them back."""
        groups = [getattr(self, name) for name in GROUPS]
        return {f.name: getattr(group, f.name) for group in groups for f in options_of(group)}

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

    def check_schedule(self, saved: Mapping[str, Any] | None = None) -> None:
        """Raise InputError for a warm-up that outlasts the run, if the user asked for it, or the decay.

        Args:
            saved: the options of the run that is resumed. What was good for that one stays."""
        optim, steps = self.optim, self.train.train_steps
        assert optim.warmup_steps is not None
        assert optim.decay_steps is not None
        changed = {
            name for name in ("warmup_steps", "decay_steps") if not saved or saved.get(name) != getattr(optim, name)
        }
        require(
            optim.warmup_steps < steps or "warmup_steps" not in self.given & changed,
            f"--warmup-steps {optim.warmup_steps} is not below --train-steps {steps}: the learning rate would never reach "
            f"its peak; use fewer, such as {round(_WARMUP_SHARE * steps)}, or leave the flag out",
        )
        require(
            optim.decay_method != "cosine" or optim.decay_steps > optim.warmup_steps or not changed,
            f"--decay-steps {optim.decay_steps} must be above --warmup-steps {optim.warmup_steps}"
            + ("" if "warmup_steps" in self.given else f", which is {_WARMUP_SHARE:.2%} of --train-steps"),
        )

    def check_early(self) -> None:
        """Raise InputError if a path that the user gave is plainly wrong; where no run can be resumed that has others, also
        for the schedule and the default --train-dir. The programs that train call it before they import torch."""
        general, names = self.general, set(self.given)
        is_new = (
            general.from_checkpoint is None and general.resume == "auto" and not Path(general.checkpoints_dir).exists()
        )
        if general.do_test:
            names.discard("train_dir")
        elif is_new:
            self.check_schedule()
            names.add("train_dir")
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
