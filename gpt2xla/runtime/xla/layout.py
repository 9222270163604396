"""States how the devices of a mesh divide a tensor, for XLA's partitioner."""

from __future__ import annotations

from collections.abc import Sequence

import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor


def mark(tensor: Tensor, mesh: xs.Mesh, axes: Sequence[str | None]) -> Tensor:
    """Return `tensor`, after its layout was stated: for each dimension the axis of the mesh that splits it, or None.

    It does what `xs.mark_sharding` does to a torch tensor. That one looks for the package torchax at each call, which takes
    longer than tracing a product where it is not installed."""
    torch_xla._XLAC._xla_mark_sharding(tensor, mesh.get_op_sharding(tuple(axes)))
    return tensor
