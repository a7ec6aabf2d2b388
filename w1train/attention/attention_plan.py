"""What one micro-batch's attention needs, computed once and shared by all layers and by recomputation.

Shapes: b = samples, q = query rows, k = key columns, n = query heads, g = key/value heads, d = channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from w1train.attention.backends.interface import AttentionBackend
from w1train.attention.backends.sdpa import SdpaBackend
from w1train.attention.cache import KeyValueCache
from w1train.attention.context_parallel import KeyExchange
from w1train.attention.visibility import Visibility
from w1train.runtime.ranges import kernel_group


@dataclass(slots=True)
class AttentionPlan:
    """The visibility of a micro-batch, with what the kernels make of it."""

    visibility: Visibility
    backend: AttentionBackend
    kernel_plan: Any
    """What ``backend.prepare`` gave."""
    exchange: KeyExchange | None = None
    """How keys travel between context-parallel ranks; None when each rank has whole sequences."""
    cache: KeyValueCache | None = None
    """Keys of earlier passes that come before this one's (generation by blocks); None when a pass has all its keys itself."""

    @kernel_group("attention")
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """query [b, n, q, d], key and value [b, g, k, d] -> [b, n, q, d]; zero in rows that see nothing."""
        return self.backend.attend(query, key, value, self.kernel_plan, scale)


def plan_attention(
    visibility: Visibility,
    backend: AttentionBackend | None = None,
    *,
    exchange: KeyExchange | None = None,
    cache: KeyValueCache | None = None,
) -> AttentionPlan:
    """Turn visibility into what the kernels read. Called once a micro-batch, outside the layers.

    Args:
        backend: None = torch's dense kernels (generation, whose passes are short and of ever new lengths).
    """
    backend = backend or SdpaBackend()
    return AttentionPlan(visibility, backend, backend.prepare(visibility), exchange=exchange, cache=cache)
