"""Parameter groups, the choice of the optimizer, the learning-rate schedule, and optimizer state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt2xla.config import OptimConfig
from gpt2xla.optim.muon import Muon

ADAM_EPS = 1e-8
ADAM_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
MOMENTS = ADAM_MOMENTS + MUON_MOMENTS

Groups = list[dict[str, Any]]


def build_optimizer(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype, adam: Callable[[Groups], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """`adam` of all parameters or, with --optim-type muon, of those that are not the blocks' matrices. `dtype` is the run's
    compute type."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if _is_muons(config, name, p.shape)}
    others = adam(parameter_groups([p for name, p in named.items() if name not in matrices], config.weight_decay))
    if not matrices:
        return others
    # Queries, keys and values share a parameter for speed alone. As usual they are made orthogonal one by one; as one matrix
    # they train worse (https://verenalabs.com/posts/evaluating_muon__moe_in_llms).
    joint = [p for name, p in matrices.items() if name.endswith("c_attn.weight")]
    single = [p for name, p in matrices.items() if not name.endswith("c_attn.weight")]
    groups = [
        {"params": parameters, "blocks": blocks, "weight_decay": config.weight_decay}
        for blocks, parameters in ((3, joint), (1, single))
    ]
    return Muon(groups, others, config.learning_rate, dtype)


def _is_muons(config: OptimConfig, name: str, shape: torch.Size) -> bool:
    return config.optim_type == "muon" and name.startswith("h.") and len(shape) == 2


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> Groups:
    """Matrices and embeddings decay; biases and layer norms do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adam_arguments(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": config.betas, "eps": ADAM_EPS}


def learning_rate(config: OptimConfig, d_model: int, step: int) -> float:
    """The rate of update `step`, counted from 0.

    cosine: linear warm-up to `learning_rate` at step `warmup_steps` - 1, then half a cosine down to `min_lr` at step
    `decay_steps`, constant from there (Loshchilov and Hutter 2017, SGDR, without restarts).
    noam: `learning_rate` * d_model^-0.5 * min(n^-0.5, n * warmup_steps^-1.5) with n = step + 1 (Vaswani et al. 2017,
    equation 3).
    """
    n = step + 1
    if config.decay_method == "noam":
        ramp = n * max(config.warmup_steps, 1) ** -1.5
        return config.learning_rate * d_model**-0.5 * min(n**-0.5, ramp)
    if n <= config.warmup_steps:
        return config.learning_rate * n / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """The norm of the whole gradient before clipping (0-d); scale the gradient down to `max_norm` if that is above 0.

    Never reads the value on the host.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # a DTensor, of gradients that are split over processes
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def moments(config: OptimConfig, shapes: Mapping[str, torch.Size]) -> dict[str, dict[str, torch.Size]]:
    """What the optimizer keeps of parameters of these names and shapes: a tensor of the same shape by moment and name."""
    kept: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        for key in MUON_MOMENTS if _is_muons(config, name, shape) else ADAM_MOMENTS:
            kept.setdefault(key, {})[name] = shape
    return kept


def init_state(
    model: nn.Module,
    config: OptimConfig,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any] | None,
    to_device: Callable[[Tensor], Tensor],
    *,
    count_on_device: bool = True,
    **extra: Tensor,
) -> None:
    """Give each parameter of `optimizer` its state before the first step: zeros, or what `export_state` returned on any
    runtime.

    With the state there from the start, the first step is no other graph than the ones after it. `count_on_device` says
    where Adam expects its step count, `extra` what else it expects beside the two moments.
    """
    updated = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    kept = moments(config, {name: parameter.shape for name, parameter in model.named_parameters()})
    for name, parameter in model.named_parameters():
        if parameter not in updated:
            continue
        own = {key: saved[key][name] if saved else torch.zeros(parameter.shape) for key in kept if name in kept[key]}
        state = {key: to_device(tensor) for key, tensor in own.items()}
        if name in kept[ADAM_MOMENTS[0]]:
            step = torch.tensor(float(saved["step"] if saved else 0))
            state["step"] = to_device(step) if count_on_device else step
            state |= {key: to_device(tensor) for key, tensor in extra.items()}
        optimizer.state[parameter] = state


def export_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, still on the device: {"step": tensor, "exp_avg": {...}, "exp_avg_sq": {...}}
    and, of Muon, "momentum_buffer": {...}; each parameter is under one optimizer's. What an optimizer that is split over
    processes does not have here is left out."""
    named = [(name, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state]
    exported = {key: {name: state[key] for name, state in named if key in state} for key in MOMENTS}
    return {"step": named[0][1]["step"], **{key: tensors for key, tensors in exported.items() if tensors}}
