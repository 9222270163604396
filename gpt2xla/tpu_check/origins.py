"""What the names in a traced graph say: the part of the model, and of its backward pass, that an operation belongs to.

`names.py` gives the names. They outlive the compiler's work."""

from __future__ import annotations

from typing import NamedTuple

BACKWARD = "backward"  # the scope around that of a module, where an operation is of its backward pass


class Origin(NamedTuple):
    module: str  # its name, such as h.0.mlp.c_fc; "model", "loss" and "optimizer" for what is in none; "" if unknown
    direction: str  # "forward", "backward", or "forward again" under checkpointing; "" if unknown
    operations: tuple[str, ...]  # of PyTorch/XLA, the outer one first

    def __str__(self) -> str:
        """As `h.0.mlp.c_fc`, `h.0.mlp.c_fc backward`, or the operation alone."""
        if not self.module:
            return self.operations[-1]
        return self.module if self.direction in ("", "forward") else f"{self.module} {self.direction}"


def origin_of(op_name: str) -> Origin:
    """Read a name: `model.1/h.0.659/h.0.mlp.15/h.0.mlp.c_fc.1/aten__mm`. Each scope carries a counter."""
    *outer, operation = op_name.split("/")
    scopes = [scope.rsplit(".", 1)[0] for scope in outer]
    modules: list[str] = []
    for scope in scopes:
        if scope.startswith(".") and modules:  # a part of the module around it
            modules[-1] += scope
        elif "__" not in scope:
            modules.append(scope)
    operations = *(scope for scope in scopes if "__" in scope), operation
    short = tuple(name.removeprefix("aten__").removeprefix("xla__") for name in operations)
    if not modules or modules[-1] == BACKWARD:
        return Origin("", "", short)
    if modules[-2:-1] == [BACKWARD]:
        return Origin(modules[-1], "backward", short)
    return Origin(modules[-1], "forward again" if BACKWARD in modules else "forward", short)
