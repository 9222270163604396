"""What a user may set: every option of a run, and how options are written and read."""

from gpt2xla.config.options import flag, option, options_of
from gpt2xla.config.run import (
    GROUPS,
    PRECISION_ALIASES,
    PRESETS,
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
    "PRECISION_ALIASES",
    "PRESETS",
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
]
