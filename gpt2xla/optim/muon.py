"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum whose updates are made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

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


class Muon(torch.optim.Optimizer):
    """Two optimizers as one: Muon for `matrices`, and `others` for its own parameters.

    The rate is that of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"): 0.2 * sqrt(longer side) * `lr`, which makes an
    update as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so that both share one rate and one weight decay.
    torch's own class reads the rate on the host, and cannot skip an update on the device.

    `matrices` are parameter groups with `weight_decay` and `blocks`: how many matrices of equal size each parameter stacks
    along its rows. `others` shares its groups and its state with this one. Products that orthogonalize are in `dtype`.

    Parameters of one shape are updated together, up to `stack_bytes` of them: one of a block's matrices is too small to
    fill a GPU. An update takes about eight times as much memory for a while. 0 updates them one by one."""

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: torch.optim.Optimizer,
        lr: float,
        dtype: torch.dtype,
        stack_bytes: int = 0,
    ) -> None:
        super().__init__(matrices, {"lr": lr})
        self._stacks = [
            (group, stack) for group in self.param_groups for stack in _stacks(group["params"], stack_bytes)
        ]
        self.matrices, self.others, self.dtype = self.param_groups, others, dtype
        self.param_groups = [*self.matrices, *others.param_groups]
        others.state = self.state
        # Tells torch.amp.GradScaler whether `step` handles `found_inf` on the device.
        self._step_supports_amp_scaling = getattr(others, "_step_supports_amp_scaling", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, found_inf: Tensor | None = None) -> None:  # type: ignore[override]
        """Update all parameters, unless `found_inf` is not 0.

        `found_inf` comes as an argument, as torch_xla's sync-free optimizers take it, or as an attribute, as torch's fused
        ones do; `others` gets it in the same way."""
        assert closure is None
        skip = getattr(self, "found_inf", None) if found_inf is None else found_inf
        for group, parameters in self._stacks:
            self._update(group, parameters, skip)
        if found_inf is not None:
            self.others.step(found_inf=found_inf)  # type: ignore[call-overload]
        else:
            if skip is not None:
                self.others.grad_scale, self.others.found_inf = None, skip  # type: ignore[attr-defined]
            self.others.step()

    def _update(self, group: dict[str, Any], parameters: list[Tensor], skip: Tensor | None) -> None:
        """Update parameters of one shape, joined along their rows."""
        momentum_buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradient = _joined([parameter.grad for parameter in parameters])  # type: ignore[misc]
        parameter, momentum_buffer = _joined(parameters), _joined(momentum_buffers)
        momentum = momentum_buffer + (1 - MOMENTUM) * (gradient - momentum_buffer)
        nesterov = gradient + MOMENTUM * (momentum - gradient)
        blocks = nesterov.unflatten(0, (group["blocks"] * len(parameters), -1))
        update = 0.2 * math.sqrt(max(blocks.shape[1:])) * orthogonalized(blocks, self.dtype).flatten(0, 1)
        # Not as a factor 1 - rate * weight_decay: for a small rate that rounds to 1, and on XLA it would be another graph.
        step = group["lr"] * (update + group["weight_decay"] * parameter)
        for tensors, old, new in (
            (momentum_buffers, momentum_buffer, momentum),
            (parameters, parameter, parameter - step),
        ):
            kept = new if skip is None else torch.where(skip > 0, old, new)
            if len(tensors) == 1:
                tensors[0].copy_(kept)
            else:
                torch._foreach_copy_(tensors, kept.chunk(len(tensors)))


def _stacks(parameters: Iterable[Tensor], stack_bytes: int) -> list[list[Tensor]]:
    """Split the parameters into lists of one shape and at most `stack_bytes`, or of one parameter."""
    stacks: list[list[Tensor]] = []
    newest: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        stack = newest.get(parameter.shape)
        if stack is None or (len(stack) + 1) * parameter.nbytes > stack_bytes:
            stack = newest[parameter.shape] = []
            stacks.append(stack)
        stack.append(parameter)
    return stacks


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `matrices` (N, rows, columns) with their singular values brought near 1, to between about 0.7 and 1.2.

    Five steps of a Newton-Schulz iteration, whose coefficients Jordan chose for speed instead of convergence. Products are
    computed in `dtype`."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    norm = x.square().sum((1, 2), keepdim=True).sqrt()
    x = (x / norm.clamp(min=EPS)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        # baddbmm rounds once; the sums of two rounded products are twice as far off in bf16.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
