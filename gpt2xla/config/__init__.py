"""What a user may set: every option of a run, and how options are written, read and checked."""

# ruff: noqa: F401, I001
from gpt2xla.config.options import flag, option, options_of, require_at_least
from gpt2xla.config.model import MODEL_HELP, PRESETS, TOKENIZER_HELP, ModelConfig, Preset
from gpt2xla.config.optim import OPEN_ENDED, OptimConfig
from gpt2xla.config.recipes import RECIPES, Recipe
from gpt2xla.config.train import PRECISION_ALIASES, Precision, TrainConfig
from gpt2xla.config.run import GROUPS, DataConfig, GeneralConfig, RunConfig, WandbConfig
from gpt2xla.config.runners import TorchConfig, XlaConfig
