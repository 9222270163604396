"""JAX lowers interpreted kernels in seconds instead of minutes."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax._src.interpreters import mlir


def told_apart() -> None:
    """Have JAX look up a program's constant arrays by their values.

    JAX 0.7 gives them all one hash, so that each is compared with all others before it, and kernels have thousands."""
    literal: Any = mlir.HashableLiteral
    init = literal.__init__

    def with_data(self: Any, value: Any) -> None:
        init(self, value)
        if self.data is None:
            self.data = np.asarray(value.val).tobytes()

    if init.__name__ != with_data.__name__:
        literal.__init__ = with_data
