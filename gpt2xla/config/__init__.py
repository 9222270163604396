"""What a user may set: every option of a run, and how options are written, read and checked."""

# ruff: noqa: F401, I001
from gpt2xla.config.options import flag, option, options_of, require_at_least
from gpt2xla.config.run import (
    GROUPS, MODEL_HELP, PRECISION_ALIASES, PRESETS, TOKENIZER_HELP, DataConfig, GeneralConfig, ModelConfig, OptimConfig,
    Precision, Preset, RunConfig, TrainConfig, WandbConfig,
)  # fmt: skip
from gpt2xla.config.runners import TorchConfig, XlaConfig
