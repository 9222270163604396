"""An optimizer's state by parameter name: the form in which checkpoints hold it, whatever the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt2xla.config import OptimConfig
from gpt2xla.optim.muon import Muon, is_updated_by_muon, own_part

ADAM_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
MOMENTS = ADAM_MOMENTS + MUON_MOMENTS


def moment_shapes(config: OptimConfig, shapes: Mapping[str, torch.Size]) -> dict[str, dict[str, torch.Size]]:
    """Return the shapes of what the optimizer keeps for parameters of these names and shapes, by moment and name."""
    kept: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        for key in MUON_MOMENTS if is_updated_by_muon(config, name, shape) else ADAM_MOMENTS:
            kept.setdefault(key, {})[name] = shape
    return kept


def init_state(
    model: nn.Module,
    config: OptimConfig,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any] | None,
    to_device: Callable[[Tensor], Tensor],
    zeros: Callable[[Tensor], Tensor],
    *,
    count_on_device: bool = True,
    **extra: Tensor,
) -> None:
    """Give each parameter of `optimizer` its state before the first step, so that a compiled first step is the same graph as
    the later ones.

    `saved` is what `export_state` returned on any runtime, for `to_device`; None starts from `zeros` like a parameter, on
    its device. `extra` is what Adam expects beside its two moments, and its step count is on the device with
    `count_on_device`."""
    if isinstance(optimizer, Muon):
        updated = optimizer.with_state()
    else:
        updated = {parameter for group in own_part(optimizer).param_groups for parameter in group["params"]}
    kept = moment_shapes(config, {name: parameter.shape for name, parameter in model.named_parameters()})
    for name, parameter in model.named_parameters():
        if parameter not in updated:
            continue
        own = [key for key in kept if name in kept[key]]
        state = {key: to_device(saved[key][name]) if saved else zeros(parameter) for key in own}
        if name in kept[ADAM_MOMENTS[0]]:
            step = torch.tensor(float(saved["step"] if saved else 0))
            state["step"] = to_device(step) if count_on_device else step
            state |= {key: to_device(tensor) for key, tensor in extra.items()}
        own_part(optimizer).state[parameter] = state


def export_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state by parameter name, still on the device: {"step": tensor, "exp_avg": {...}, "exp_avg_sq": {...}}, and
    with Muon also "momentum_buffer": {...}; a parameter has either Adam's moments or Muon's. If the optimizer is split over
    processes, only this process's part is returned."""
    named = [(name, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state]
    exported = {key: {name: state[key] for name, state in named if key in state} for key in MOMENTS}
    step = next(state["step"] for _, state in named if "step" in state)
    return {"step": step, **{key: tensors for key, tensors in exported.items() if tensors}}
