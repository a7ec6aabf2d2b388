"""What one micro-batch's attention needs, computed once and shared by all layers and by recomputation.

Shapes: b = samples, q = query rows, k = key columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from w1train.attention.cache import KeyValueCache
from w1train.attention.context_parallel import KeyExchange
from w1train.attention.visibility import Visibility


@dataclass(slots=True)
class AttentionPlan:
    """The visibility of a micro-batch, with the mask that dense kernels read."""

    visibility: Visibility
    mask: Tensor | None
    """bool [b or 1, 1, q, k], True = visible; None when everything is visible, so that unmasked kernels can run."""
    blind_rows: Tensor | None
    """bool [b or 1, q]: rows that see nothing (padding); their output is zero. None when there is none."""
    exchange: KeyExchange | None = None
    """How keys travel between context-parallel ranks; None when each rank has whole sequences."""
    cache: KeyValueCache | None = None
    """Keys of earlier passes that come before this one's (generation by blocks); None when a pass has all its keys itself."""


def plan_attention(visibility: Visibility, exchange: KeyExchange | None = None, cache: KeyValueCache | None = None) -> AttentionPlan:
    """Turn visibility into what the kernels read. Called once a micro-batch, outside the layers."""
    if visibility.everything_visible():
        return AttentionPlan(visibility, mask=None, blind_rows=None, exchange=exchange, cache=cache)
    mask = visibility.dense()
    blind = ~mask.any(dim=-1)
    blind_rows = blind if bool(blind.any()) else None
    return AttentionPlan(visibility, mask=mask[:, None], blind_rows=blind_rows, exchange=exchange, cache=cache)
