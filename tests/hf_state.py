"""The reverse of `to_hf_state`, for weights in memory."""

from collections.abc import Mapping

from torch import Tensor

from gpt2xla.checkpoint.formats.parameter_names import CONV1D, is_bias, is_mask
from gpt2xla.config import ModelConfig


def from_hf_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a transformers model, or their gradients, by our names and in our layout."""
    out: dict[str, Tensor] = {}
    for their_name, tensor in state.items():
        name = their_name.removeprefix("transformer.")
        if not (
            is_mask(name) or (is_bias(name) and not config.bias) or (name == "lm_head.weight" and config.tie_weights)
        ):
            out[name] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor
    return out
