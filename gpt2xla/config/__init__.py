"""What a user may set: every option of a run, and how options are written, read and checked."""

from gpt2xla.config.options import flag, option, options_of, require_at_least
from gpt2xla.config.run import (
    GROUPS,
    MODEL_HELP,
    PRECISION_ALIASES,
    PRESETS,
    TOKENIZER_HELP,
    DataConfig,
    GeneralConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    Preset,
    RunConfig,
    TorchConfig,
    TrainConfig,
    WandbConfig,
    XlaConfig,
)

__all__ = [
    "GROUPS",
    "MODEL_HELP",
    "PRECISION_ALIASES",
    "PRESETS",
    "TOKENIZER_HELP",
    "DataConfig",
    "GeneralConfig",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "Preset",
    "RunConfig",
    "TorchConfig",
    "TrainConfig",
    "WandbConfig",
    "XlaConfig",
    "flag",
    "option",
    "options_of",
    "require_at_least",
]
