"""Several documents in one sequence: where each begins, and what attention must not see of the others.

An end-of-text token begins a document: the tokens after it are predicted from it alone, as when a text is generated from
nothing. What comes before the first one in a sequence is a document, too.
Shape suffixes: B sequences, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(ids_BT: Tensor, end_of_text: int) -> Tensor:
    """Return for each token the index of the first token of its document, as int32 (B, T).

    This one number is all that attention needs: token t sees the tokens from its document's start to t. It also names the
    document, and t minus it is the token's position."""
    length = ids_BT.shape[1]
    indices = torch.arange(length, dtype=torch.int32, device=ids_BT.device)
    starts_BT = torch.where(ids_BT == end_of_text, indices, 0)
    # A running maximum over 1, 2, 4, ... tokens; torch_xla leaves torch.cummax to the host.
    reach = 1
    while reach < length:
        longer_BT = torch.maximum(starts_BT[:, reach:], starts_BT[:, :-reach])
        starts_BT = torch.cat([starts_BT[:, :reach], longer_BT], dim=1)
        reach *= 2
    return starts_BT


def document_mask(starts_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to the scores of causal attention within documents (B, 1, T, T): 0 for keys that a query sees, and
    -inf for others. `starts_BT`: see `document_starts`."""
    indices = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    visible_BTT = (indices <= indices[:, None]) & (indices >= starts_BT[:, :, None])
    zero = torch.zeros((), dtype=dtype, device=starts_BT.device)
    return torch.where(visible_BTT, zero, -torch.inf)[:, None]
