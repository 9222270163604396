"""What --fsdp does around a forward pass: weights, split over the devices, are whole while a module computes with them.

XLA's partitioner could find the communication by itself. But it then multiplies in many steps, each of which waits for one
device's part, or sends activations instead of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gpt2xla.model.arithmetic import Fence, compute_dtype
from gpt2xla.model.gpt2 import GPT2, Block

Place = Callable[[Tensor], Tensor]  # states a tensor's layout, and returns it
Gather = Callable[[Sequence[Tensor]], list[Tensor]]


class WholeWeights:
    """Lets blocks, embeddings and the output head find whole weights, and sends back the sums of their gradients.

    `split` states the layout of parameters, `whole` that of a tensor which every device has. Products get the type in which
    they compute, and so half the bytes in a bf16 run; embeddings are looked up in full precision. With `again`, the backward
    pass gathers a block's weights once more, instead of keeping them since the forward pass: while the following block's
    attention is at work, so that they come in time, and behind `fence`, so that they do not come earlier."""

    def __init__(self, model: GPT2, split: Place, whole: Place, fence: Fence, *, again: bool) -> None:
        self._split, self._whole, self._fence = split, whole, fence
        blocks = [module for module in model.h if isinstance(module, Block)]
        for block in blocks:
            matrices = [(m, n, p) for m in block.modules() for n, p in m.named_parameters(recurse=False) if p.dim() > 1]
            _while_running(block, matrices, self._gather)
        for block, following in pairwise(blocks) if again else ():
            self._gather_again(block, following)
        for embedding in (model.wte, model.wpe):
            _while_running(embedding, [(embedding, "weight", embedding.weight)], self._gather_exactly)
        head = model.wte if model.config.tie_weights else model.lm_head
        _while_running(model, [(head, "weight", head.weight)], self._gather_head)

    def _gather(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [_Whole.apply(weight, compute_dtype(weight), self._split, self._whole) for weight in weights]

    def _gather_exactly(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [_Whole.apply(weight, weight.dtype, self._split, self._whole) for weight in weights]

    def _gather_head(self, weights: Sequence[Tensor]) -> list[Tensor]:
        # The loss sums the head's gradient over its pieces in the type of the weight that it is given.
        return [whole.to(weight.dtype) for whole, weight in zip(self._gather(weights), weights, strict=True)]

    def _gather_again(self, block: Block, following: Block) -> None:
        """Let the backward pass of `block` find weights that were gathered during that of the `following` block."""
        # Of the forward pass, until the following block's attention is at work.
        running: list[tuple[_Saved, saved_tensors_hooks]] = []

        def enter(module: nn.Module, inputs: Any) -> None:
            if torch.is_grad_enabled():
                saved = _Saved(
                    [p for m in block.modules() for p in m._parameters.values() if p is not None and p.dim() > 1]
                )
                running[:] = [(saved, saved_tensors_hooks(saved.pack, saved.unpack))]
                running[0][1].__enter__()

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if running:
                running[0][1].__exit__()

        def before_projection(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if running:
                saved, _ = running.pop()
                inputs[0].register_hook(lambda gradient: self._refill(saved, weights, gradient))

        weights = [p for m in block.modules() for p in m.parameters(recurse=False) if p.dim() > 1]
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)
        following.attn.c_proj.register_forward_pre_hook(before_projection)

    def _refill(self, saved: _Saved, weights: Sequence[Tensor], gradient: Tensor) -> Tensor:
        parts = [self._split(p.detach().to(w.dtype) * 1) for p, w in zip(weights, saved.whole, strict=True)]
        gradient = gradient.clone()
        self._fence([*parts, gradient])
        saved.whole = [self._whole(self._split(part * 1) * 1) for part in parts]
        return gradient


class _Saved:
    """Stands for `whole` weights among what autograd keeps for a backward pass, so that others can take their place."""

    def __init__(self, whole: list[Tensor]) -> None:
        self.whole = whole

    def pack(self, tensor: Tensor) -> Tensor | tuple[int, bool]:
        for number, weight in enumerate(self.whole):
            if tensor is weight:
                return number, False
            if tensor._base is weight and tensor.shape == weight.T.shape and tensor.stride() == weight.T.stride():
                return number, True  # as a linear layer keeps it
        return tensor

    def unpack(self, packed: Tensor | tuple[int, bool]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        number, transposed = packed
        return self.whole[number].T if transposed else self.whole[number]


def _while_running(module: nn.Module, weights: Sequence[tuple[nn.Module, str, Tensor]], gather: Gather) -> None:
    """Put gathered `weights`, each a module's parameter of that name, into their places while `module` runs forward."""
    before: list[list[Any]] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        before.append([owner._parameters[name] for owner, name, _ in weights])
        gathered = gather([parameter for _, _, parameter in weights])
        for (owner, name, _), whole in zip(weights, gathered, strict=True):
            owner._parameters[name] = whole  # type: ignore[assignment]

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        for (owner, name, _), previous in zip(weights, before.pop(), strict=True):
            owner._parameters[name] = previous

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, split: Place, whole: Place) -> Tensor:
        ctx.dtype, ctx.split, ctx.whole = weight.dtype, split, whole
        if dtype != weight.dtype:
            weight = split(weight.to(dtype))  # before it is sent
        return whole(weight * 1)  # a tensor has one layout

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Both sides of a sum over the devices are stated: it is made in the type of the product, and of each part only where
        # the part is kept.
        return ctx.split((ctx.whole(grads[0] * 1) * 1).to(ctx.dtype)), None, None, None
