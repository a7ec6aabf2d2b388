"""Attention by its formula, with which the other backends are compared.

Shapes: b = samples, q = query rows, k = key columns, n = query heads, g = key/value heads, d = channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.attention.backends.interface import AttentionBackend
from w1train.attention.visibility import Visibility


class ReferenceBackend(AttentionBackend):
    """Attention that computes all scores at once, in fp32. It is slow, and takes as much memory as the mask for each head and layer."""

    name = "reference"

    def prepare(self, visibility: Visibility) -> Tensor:
        """Return the dense mask, bool [b or 1, q, k]."""
        return visibility.dense()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float | None = None) -> Tensor:
        """Compute AttentionBackend.attend."""
        return attend_reference(query, key, value, plan, scale)


def attend_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Return the explicit softmax over the visible keys, times the values, in fp32 (in fp64 if the inputs are in fp64). Rows that see
    nothing give zero.

    Args:
        query: [b, n, q, d]; key, value: [b, g, k, d] with n a multiple of g.
        mask: bool [b or 1, q, k].
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
