"""The plan of a micro-batch's attention, which is computed once and shared by all layers and by recomputation.

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
    """The visibility of a micro-batch, with what the kernels of a backend read of it."""

    visibility: Visibility
    backend: AttentionBackend
    kernel_plan: Any
    """What ``backend.prepare`` returned."""
    exchange: KeyExchange | None = None
    """How context-parallel ranks exchange keys; None = each rank has whole sequences."""
    cache: KeyValueCache | None = None
    """Keys of earlier passes, which precede the keys of this pass (generation by blocks); None = this pass computes all keys that it
    needs."""

    @kernel_group("attention")
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """Return attention [b, n, q, d] from query [b, n, q, d], key and value [b, g, k, d]. It is zero in rows that see nothing."""
        return self.backend.attend(query, key, value, self.kernel_plan, scale)


def plan_attention(
    visibility: Visibility,
    backend: AttentionBackend | None = None,
    *,
    exchange: KeyExchange | None = None,
    cache: KeyValueCache | None = None,
) -> AttentionPlan:
    """Prepare what the kernels read of a visibility. This is called once for each micro-batch, outside the layers.

    Args:
        backend: None = torch's dense kernels. They suit generation, whose passes are short and have many different lengths.
    """
    backend = backend or SdpaBackend()
    return AttentionPlan(visibility, backend, backend.prepare(visibility), exchange=exchange, cache=cache)
