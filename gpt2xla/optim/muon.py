"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum whose updates are made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2xla.config import OptimConfig

# Jordan's values, which are torch.optim.Muon's defaults too.
MOMENTUM, ITERATIONS = 0.95, 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def is_updated_by_muon(config: OptimConfig, name: str, shape: torch.Size) -> bool:
    """Tell whether Muon updates the parameter `name`: with --optim-type muon, the matrices of the blocks."""
    return config.optim_type == "muon" and name.startswith("h.") and len(shape) == 2


class Stack(NamedTuple):
    """Parameters of one shape, which are updated together."""

    group: dict[str, Any]
    parameters: list[Tensor]
    first: int  # how many matrices' parameters lie in the stacks before


class Owners:
    """Which devices make a stack's matrices orthogonal, and how these travel. Here: this device alone, and not at all.

    Shapes: N parameters of a stack (R, C), of which `collect` gives this device n; those of a tensor that is split over
    devices are what lies here of it."""

    count = 1  # of the devices that share a stack

    def has_state(self, stack: Stack) -> list[bool]:
        """Return for each parameter whether its momentum, or a part of it, is on this device."""
        return [True] * len(stack.parameters)

    def collect(self, matrices: Sequence[Tensor], stack: Stack) -> Tensor:
        """Return this device's matrices (n, R, C), whole, of those that have state here. Collective."""
        return torch.stack(list(matrices))

    def distribute(self, updates: Tensor, stack: Stack) -> Sequence[Tensor]:
        """Return the update of each of the stack's parameters, from those of this device's (n, R, C). Collective."""
        return updates.unbind(0)


class Muon(torch.optim.Optimizer):
    """Two optimizers as one: Muon for `matrices`, and `others` for its own parameters.

    The rate is that of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"): 0.2 * sqrt(longer side) * `lr`, which makes an
    update as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so that both share one rate and one weight decay.
    torch's own class reads the rate on the host, and cannot skip an update on the device.

    `matrices` are parameter groups with `weight_decay` and `blocks`: how many matrices of equal size each parameter stacks
    along its rows. `others` shares its groups and its state with this one. Products that orthogonalize are in `dtype`.

    Parameters of one shape are updated together, up to `stack_bytes` of them for each of `owners`: one of a block's
    matrices is too small to fill a GPU. An update takes about eight times as much memory for a while. 0 updates them one
    by one."""

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: torch.optim.Optimizer,
        lr: float,
        dtype: torch.dtype,
        stack_bytes: int = 0,
        owners: Owners | None = None,
    ) -> None:
        super().__init__(matrices, {"lr": lr})
        self.owners = owners or Owners()
        self._stacks = _stacks(self.param_groups, stack_bytes, self.owners.count)
        self.matrices, self.others, self.dtype = self.param_groups, others, dtype
        self.param_groups = [*self.matrices, *others.param_groups]
        others.state = own_part(others).state = self.state
        # Tells torch.amp.GradScaler whether `step` handles `found_inf` on the device.
        self._step_supports_amp_scaling = getattr(others, "_step_supports_amp_scaling", False)

    def with_state(self) -> set[Tensor]:
        """Return the parameters whose state, or a part of it, is on this device."""
        others = {parameter for group in own_part(self.others).param_groups for parameter in group["params"]}
        return others.union(*(self._held(stack) for stack in self._stacks))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, found_inf: Tensor | None = None) -> None:  # type: ignore[override]
        """Update all parameters, unless `found_inf` is not 0.

        `found_inf` comes as an argument, as torch_xla's sync-free optimizers take it, or as an attribute, as torch's fused
        ones do; `others` gets it in the same way."""
        assert closure is None
        skip = getattr(self, "found_inf", None) if found_inf is None else found_inf
        for stack in self._stacks:
            self._update(stack, skip)
        if found_inf is not None:
            self.others.step(found_inf=found_inf)  # type: ignore[call-overload]
        else:
            if skip is not None:
                own = own_part(self.others)
                own.grad_scale, own.found_inf = None, skip  # type: ignore[attr-defined]
            self.others.step()

    def _held(self, stack: Stack) -> list[Tensor]:
        return [p for p, is_here in zip(stack.parameters, self.owners.has_state(stack), strict=True) if is_here]

    def _update(self, stack: Stack, skip: Tensor | None) -> None:
        held, parameters = self._held(stack), [_here(parameter) for parameter in stack.parameters]
        gradients = [_here(parameter.grad) for parameter in held]  # type: ignore[arg-type]
        buffers = [_here(self.state[parameter]["momentum_buffer"]) for parameter in held]
        momenta: Sequence[Tensor] = []
        nesterov: Sequence[Tensor] = []
        if held:
            momenta = torch._foreach_lerp(buffers, gradients, 1 - MOMENTUM)
            nesterov = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        if self.dtype == torch.bfloat16:  # it has fp32's range, and half the size to stack and to send
            nesterov = [matrix.to(self.dtype) for matrix in nesterov]
        whole = self.owners.collect(nesterov, stack)
        blocks = whole.unflatten(1, (stack.group["blocks"], -1)).flatten(0, 1)
        scale = 0.2 * math.sqrt(max(blocks.shape[1:]))
        updates = self.owners.distribute(orthogonalized(blocks, self.dtype).reshape_as(whole), stack)
        # Weight decay not as a factor 1 - rate * weight_decay: for a small rate that rounds to 1, and on XLA it would be
        # another graph.
        steps = torch._foreach_mul([update.to(parameters[0].dtype) for update in updates], scale)
        torch._foreach_add_(steps, parameters, alpha=stack.group["weight_decay"])
        torch._foreach_mul_(steps, stack.group["lr"])
        old, new = [*buffers, *parameters], [*momenta, *torch._foreach_sub(parameters, steps)]
        if skip is not None:
            new = [torch.where(skip > 0, before, after) for before, after in zip(old, new, strict=True)]
        torch._foreach_copy_(old, new)


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that computes: inside one that is split over processes, this process's part."""
    return getattr(optimizer, "optim", optimizer)


def _stacks(groups: list[dict[str, Any]], stack_bytes: int, owners: int) -> list[Stack]:
    """Split the parameters into stacks of one shape each, with at most `stack_bytes` for each owner, or one parameter."""
    stacks: list[Stack] = []
    number = 0
    for group in groups:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            most = owners * max(1, stack_bytes // (shape.numel() * parameters[0].element_size()))
            for start in range(0, len(parameters), most):
                stacks.append(Stack(group, parameters[start : start + most], number))
                number += len(stacks[-1].parameters)
    return stacks


def _here(tensor: Tensor) -> Tensor:
    """Return what lies on this device of a tensor that may be split."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `matrices` (N, rows, columns) with their singular values brought near 1, to between about 0.7 and 1.2.

    Five steps of a Newton-Schulz iteration, whose coefficients Jordan chose for speed instead of convergence. Products are
    computed in `dtype`, which is that of the result."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = x.square().sum((1, 2), keepdim=True).sqrt()
    x = (x / norm.clamp(min=EPS)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        # baddbmm rounds once; the sums of two rounded products are twice as far off in bf16.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
