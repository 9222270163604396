"""Loss scaling for fp16 on XLA: torch.amp.GradScaler's rule, with its state on the device and no branch on the host.

GradScaler reads on the host whether a gradient overflowed. Here that stays a tensor, and an update to be skipped is computed
but not applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# GradScaler's own defaults (Micikevicius et al. 2018, Mixed Precision Training, section 3.2, with growth).
INIT_SCALE, GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL = 65536.0, 2.0, 0.5, 2000


class LossScaler:
    """Scales the loss up and the gradients down, and adapts the scale to overflows.

    `to_device` puts a host tensor on the device as data, not as a constant of the graph."""

    def __init__(self, to_device: Callable[[Tensor], Tensor]) -> None:
        self.to_device = to_device
        self.growth_factor, self.backoff_factor, self.growth_interval = GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL
        self._set(INIT_SCALE, 0)

    def _set(self, scale: float, growth_tracker: int) -> None:
        self._scale = self.to_device(torch.tensor(scale))
        self.growth_tracker = self.to_device(torch.tensor(growth_tracker, dtype=torch.int32))

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self._scale

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide every gradient by the scale, in place."""
        inverse = 1 / self._scale
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                parameter.grad.mul_(inverse)

    def follow(self, grad_norm: Tensor) -> Tensor:
        """Return whether the update must be skipped, 1 or 0 (fp32, 0-d), and adapt the scale.

        A skip lowers the scale; `growth_interval` updates in a row raise it, but not beyond fp32. `grad_norm` is that of
        all processes' unscaled gradients. It is finite only if they are, so all processes agree."""
        skipped = ~torch.isfinite(grad_norm)
        counted = self.growth_tracker + 1
        due = counted == self.growth_interval
        grown = self._scale * self.growth_factor
        larger = torch.where(due & torch.isfinite(grown), grown, self._scale)
        self._scale.copy_(torch.where(skipped, self._scale * self.backoff_factor, larger))
        self.growth_tracker.copy_(torch.where(skipped | due, torch.zeros_like(counted), counted))
        return skipped.to(torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch.amp.GradScaler's layout, so that a run moves between runtimes. Reads the device."""
        return {
            "scale": self._scale.item(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": int(self.growth_tracker.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
        self._set(state["scale"], state["_growth_tracker"])


def step_unless(found_inf: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Call `optimizer.step()`, and undo it on the device if `found_inf` is not 0: weights and state keep their values."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [*(p for group in optimizer.param_groups for p in group["params"]), *state]
    with torch.no_grad():
        before = [tensor.clone() for tensor in tensors]
        optimizer.step()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(found_inf > 0, old, tensor))
