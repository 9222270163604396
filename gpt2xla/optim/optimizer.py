"""The optimizer that --optim-type names, its parameter groups, and gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gpt2xla.config import OptimConfig
from gpt2xla.optim.muon import Muon, Owners, is_updated_by_muon

ADAM_EPS = 1e-8

Groups = list[dict[str, Any]]


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    dtype: torch.dtype,
    adam: Callable[[Groups], torch.optim.Optimizer],
    stack_bytes: int = 0,
    owners: Owners | None = None,
) -> torch.optim.Optimizer:
    """Return `adam` of all parameters or, with --optim-type muon, Muon of the blocks' matrices and `adam` of the rest.

    `adam` builds the runtime's Adam from parameter groups; `dtype` is the run's compute type. Muon updates up to
    `stack_bytes` of matrices together, and divides the work as `owners` say."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if is_updated_by_muon(config, name, p.shape)}
    others = adam(parameter_groups([p for name, p in named.items() if name not in matrices], config.weight_decay))
    if not matrices:
        return others
    # Queries, keys and values share a parameter only for speed. As usual they are made orthogonal one by one; as one matrix
    # they train worse (https://verenalabs.com/posts/evaluating_muon__moe_in_llms).
    joint = [p for name, p in matrices.items() if name.endswith("c_attn.weight")]
    single = [p for name, p in matrices.items() if not name.endswith("c_attn.weight")]
    groups = [
        {"params": parameters, "blocks": blocks, "weight_decay": config.weight_decay}
        for blocks, parameters in ((3, joint), (1, single))
    ]
    return Muon(groups, others, config.learning_rate, dtype, stack_bytes, owners)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> Groups:
    """Split the parameters: matrices and embeddings decay, biases and layer norms do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm`, if above 0; return its norm before that (0-d), which the host never reads."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # a DTensor: the gradients are split over processes
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
