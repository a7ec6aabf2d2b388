"""torch's scaled_dot_product_attention with a dense mask on any device, and on the CPU with rectangles where these are faster.

Shapes: b = samples, q = query rows, k = key columns, n = query heads, g = key/value heads, d = channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from w1train.attention.backends.interface import AttentionBackend
from w1train.attention.backends.rectangles import Rectangle, attend_rectangles, rectangles_of
from w1train.attention.visibility import Visibility


@dataclass(slots=True)
class DensePlan:
    """The mask that dense kernels read."""

    mask: Tensor | None
    """bool [b or 1, 1, q, k], True = visible; None = everything is visible, and kernels without a mask can run."""
    blind_rows: Tensor | None
    """bool [b or 1, q]: rows that see nothing (padding), whose output is zero; None = every row sees a key."""


class SdpaBackend(AttentionBackend):
    """torch's attention, whose kernel torch chooses: flash attention if nothing is masked."""

    name = "sdpa"

    def prepare(self, visibility: Visibility) -> DensePlan | list[Rectangle]:
        """Return rectangles if they are estimated to take less time than the dense kernel, otherwise the dense mask."""
        if visibility.everything_visible():
            return DensePlan(mask=None, blind_rows=None)
        if self.case is not None and visibility.endpoints.device.type == "cpu":
            rectangles = rectangles_of(visibility, self.case.num_heads * self.case.channels, torch.get_num_threads())
            if rectangles is not None:
                return rectangles
        return dense_plan(visibility)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: DensePlan | list[Rectangle], scale: float | None = None) -> Tensor:
        """Compute AttentionBackend.attend."""
        if isinstance(plan, DensePlan):
            return attend_dense(query, key, value, plan, scale)
        return attend_rectangles(query, key, value, plan, scale)


def dense_plan(visibility: Visibility) -> DensePlan:
    """Return the mask, and which of its rows are empty."""
    mask = visibility.dense()
    blind = ~mask.any(dim=-1)
    return DensePlan(mask[:, None], blind if bool(blind.any()) else None)


def attend_dense(query: Tensor, key: Tensor, value: Tensor, plan: DensePlan, scale: float | None = None) -> Tensor:
    """Return attention [b, n, q, d] of query [b, n, q, d]. A softmax over no keys, and its gradient, is NaN in some kernels. Rows that see
    nothing are therefore computed as if they saw everything, and then set to zero."""
    mask = plan.mask
    if plan.blind_rows is not None:
        assert mask is not None
        mask = mask | plan.blind_rows[:, None, :, None]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    if plan.blind_rows is not None:
        output = output.masked_fill(plan.blind_rows[:, None, :, None], 0.0)
    return output
