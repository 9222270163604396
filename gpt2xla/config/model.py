"""The options of a model, and the sizes that OpenAI published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gpt2xla.config.options import check_types, option, require, require_at_least, require_at_most

# A larger number is a slip: no machine holds so much, and it could take hours to find that out.
_MOST_PARAMETERS = 2**40
_MOST_LAYERS = 10_000

Preset = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

# Help texts of programs that take a trained model and its tokenizer.
MODEL_HELP = (
    "checkpoint folder, FOLDER@best, gpt2 ... gpt2-xl, a hub id, or a .safetensors, .pt or llm.c file; folders and files "
    "may be URLs (gs://, s3://, hf://)"
)
TOKENIZER_HELP = (
    "a tiktoken name such as gpt2, 'bytes', a tokenizer.json, the folder of any tokenizer that transformers reads, the URL "
    "of either, or a hub id"
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
class ModelConfig:
    """Model"""

    vocab_size: int = option(
        50304,
        "number of token ids; a new model has by default as many as its data's manifest or tokenizer says, rounded up to a "
        "multiple of 128; 50304, which is GPT-2's 50257 rounded up, pads a checkpoint with 50257",
    )
    seq_length: int = option(
        1024,
        "longest sequence, in tokens; a smaller one than a checkpoint's cuts its position embeddings; a new model has by "
        "default that of masked rows, where its data are such",
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
