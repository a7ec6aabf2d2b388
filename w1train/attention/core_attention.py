"""The core attention module that megatron-core's SelfAttention calls.

Shapes: q = query rows, k = key columns, b = samples, n = heads of this rank, g = key/value heads of this rank, d = channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.attention.plan import AttentionPlan


class CoreAttention(MegatronModule):
    """softmax(Q K^T / sqrt(d)) V over the visible keys, through torch's scaled_dot_product_attention.

    Fits megatron-core's ``CoreAttentionBuilder``. The plan comes in ``packed_seq_params.attention_plan``: of the
    arguments that reach a layer, only that one passes activation recomputation without being a tensor.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_kwargs: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, _attention_mask: Tensor | None, *, packed_seq_params: Any, **_kwargs: Any
    ) -> Tensor:
        """query [q, b, n, d], key and value [q, b, g, d] of this rank's positions -> [q, b, n * d]."""
        plan: AttentionPlan = packed_seq_params.attention_plan
        if plan.exchange is not None:
            query, key, value = plan.exchange.exchange(query, key, value)
        if plan.cache is not None:
            key, value = plan.cache.extend(self.layer_number, key, value)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = attend(query, key, value, plan, self.softmax_scale).permute(2, 0, 1, 3)
        if plan.exchange is not None:
            output = plan.exchange.restore(output)
        return output.reshape(*output.shape[:2], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None = None) -> Tensor:
    """Attention by torch's dense kernels: flash where everything is visible, with a boolean mask elsewhere.

    Args:
        query: [b, n, q, d]; key, value: [b, g, k, d] with n a multiple of g.

    Returns:
        [b, n, q, d]; zero in rows that see nothing (a softmax over nothing is NaN in some kernels, and its gradient too).
    """
    mask = plan.mask
    if plan.blind_rows is not None:
        assert mask is not None
        mask = mask | plan.blind_rows[:, None, :, None]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    if plan.blind_rows is not None:
        output = output.masked_fill(plan.blind_rows[:, None, :, None], 0.0)
    return output


def attend_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """The oracle: explicit softmax over the visible keys in fp32 (or fp64 inputs' precision); rows that see nothing give 0.

    Args:
        mask: bool [b, q, k].
    """
    working = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.to(working).repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query.to(working) @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    maximum = scores.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(working).min)
    weights = (scores - maximum).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(working).tiny)
    return (weights @ value).to(query.dtype)
