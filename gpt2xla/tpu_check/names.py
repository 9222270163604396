"""Names in the traced graph: each operation carries the part of the model, forward or backward, that it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from gpt2xla.model import gpt2
from gpt2xla.tpu_check.origins import BACKWARD
from gpt2xla.training.train_step import TrainStep

OpenScope = Callable[[str], Any]


def name_operations(step: TrainStep, open_scope: OpenScope) -> None:
    """Let the operations of `step` carry names from now on. `open_scope` opens a scope for those of its thread, until the
    object that it returns is no more.

    A name is a path of scopes as PyTorch/XLA writes it, each with a counter: `model.1/h.0.2/h.0.mlp.3/aten__mul` forward,
    `backward.4/h.0.mlp.5/aten__mul` backward, `optimizer.6/aten__mul`. Layer norms, attention and loss, which are functions,
    have scopes as if they were modules."""
    scopes, model = _Scopes(open_scope), step.model
    names = {module: name or "model" for name, module in model.named_modules()}
    for module in names:
        module.register_forward_pre_hook(lambda module, inputs: scopes.enter(names[module], inputs))
        module.register_forward_hook(lambda module, inputs, output: scopes.leave(output), always_call=True)
    kernels = model.kernels
    attention = kernels.attention and scopes.around(kernels.attention, lambda *_: f"{scopes.current}.attention")
    cross_entropy = scopes.around(kernels.cross_entropy, lambda *_: "loss")
    layer_norm = scopes.around(kernels.layer_norm, lambda x, norm: names[norm])
    model.kernels = dataclasses.replace(
        kernels, attention=attention, cross_entropy=cross_entropy, layer_norm=layer_norm
    )
    # The model calls it by its name where `kernels.attention` is None.
    gpt2.sdpa_attention = scopes.around(gpt2.sdpa_attention, lambda *_: f"{scopes.current}.attention")
    step.runtime.optimizer_step = scopes.around(step.runtime.optimizer_step, lambda *_: "optimizer")  # type: ignore[method-assign]


class _Scopes:
    """The scopes in which the forward pass is, and marks on the nodes of the backward pass that it leaves behind."""

    def __init__(self, open_scope: OpenScope) -> None:
        self._open_scope = open_scope
        self._open: list[tuple[str, Any]] = []

    @property
    def current(self) -> str:
        return self._open[-1][0]

    def enter(self, name: str, inputs: Any) -> None:
        self._mark(inputs)
        self._open.append((name, self._open_scope(name)))

    def leave(self, outputs: Any) -> None:
        self._mark(outputs)
        self._open.pop()

    def around(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        """Return `function` as computed in a scope, whose name follows from the arguments."""

        def named(*args: Any, **kwargs: Any) -> Any:
            self.enter(name(*args), args)
            result = None
            try:
                result = function(*args, **kwargs)
            finally:
                self.leave(result)
            return result

        return named

    def _mark(self, values: Any) -> None:
        """Let the nodes behind `values` that no scope has marked yet run in the current one's."""
        if not self._open:
            return
        values = values if isinstance(values, (tuple, list)) else [values]
        nodes = [value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn]
        while nodes:
            node = nodes.pop()
            marks: Any = node.metadata
            if "scope" not in marks:
                marks["scope"] = self.current
                self._name_node(node, self.current)
                nodes += [before for before, _ in node.next_functions if before]

    def _name_node(self, node: Node, name: str) -> None:
        opened: list[Any] = []

        def enter(gradients: Any) -> None:
            opened.extend([self._open_scope(BACKWARD), self._open_scope(name)])

        def leave(gradients: Any, outputs: Any) -> None:
            opened.clear()  # the last one first; with --spmd --fsdp, autograd leaves a node that it did not enter

        node.register_prehook(enter)
        node.register_hook(leave)
