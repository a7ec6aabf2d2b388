"""The core attention module that megatron-core's SelfAttention calls.

Shapes: q = query rows, k = key columns, b = samples, n = heads of this rank, g = key/value heads of this rank, d = channels.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.attention.attention_plan import AttentionPlan


class CoreAttention(MegatronModule):
    """softmax(Q K^T / sqrt(d)) V over the visible keys, computed by the backend that the plan was made for.

    The class fits megatron-core's ``CoreAttentionBuilder``. The plan is passed in ``packed_seq_params.attention_plan``, because activation
    recomputation passes only one argument that is not a tensor on to a layer, and this is that argument.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_kwargs: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, _attention_mask: Tensor | None, *, packed_seq_params: Any, **_kwargs: Any
    ) -> Tensor:
        """Return attention [q, b, n * d] of this rank's positions, from query [q, b, n, d], key and value [q, b, g, d]."""
        plan: AttentionPlan = packed_seq_params.attention_plan
        if plan.exchange is not None:
            query, key, value = plan.exchange.exchange(query, key, value)
        if plan.cache is not None:
            key, value = plan.cache.extend(self.layer_number, key, value)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = plan.attend(query, key, value, self.softmax_scale).permute(2, 0, 1, 3)
        if plan.exchange is not None:
            output = plan.exchange.restore(output)
        return output.reshape(*output.shape[:2], -1)
