"""torch's FlexAttention: Triton kernels that skip the tiles nobody sees.

Shapes: b = samples, q = query rows, k = key columns, e = num_endpoints, n = query heads, g = key/value heads, d = channels,
i = row tiles, j = key tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from w1train.attention.backends.interface import AttentionBackend, missing_cuda
from w1train.attention.visibility import Visibility

TILE = 128
_LOWEST_CAPABILITY = (8, 0)


class FlexBackend(AttentionBackend):
    """One compilation for all packings: documents and blocks reach the kernel in tensors, never in its code."""

    name = "flex"

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """torch has no backward of it for the CPU."""
        return missing_cuda(device, _LOWEST_CAPABILITY)

    def prepare(self, visibility: Visibility) -> BlockMask:
        """The tiles to visit, and the rule inside tiles seen in part."""
        return interval_block_mask(visibility)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: BlockMask, scale: float | None = None) -> Tensor:
        """As the interface says; rows that see nothing are zeroed by the kernel itself."""
        grouped = query.shape[1] != key.shape[1]
        return compiled_flex_attention()(query, key, value, block_mask=plan, scale=scale, enable_gqa=grouped)


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Not dynamic: shapes are those of the recipe, and the kernels are faster for knowing them."""
    return torch.compile(flex_attention, dynamic=False)


def interval_block_mask(visibility: Visibility, tile: int = TILE) -> BlockMask:
    """FlexAttention's block mask, from how many pairs of each tile are visible: b * q * j numbers, where the mask has b * q * k."""
    assert visibility.scattered is None
    seen = _pairs_per_tile(visibility, tile)
    full = seen == tile * tile
    partial_counts, partial_indices = _listed((seen > 0) & ~full)
    full_counts, full_indices = _listed(full)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=tile,
        mask_mod=_inside(visibility.endpoints),
        seq_lengths=(visibility.endpoints.shape[2], visibility.num_keys),
    )


def _pairs_per_tile(visibility: Visibility, tile: int) -> Tensor:
    """int64 [b, 1, i, j]; tiles that stick out over the last row or key are never full."""
    endpoints = visibility.endpoints
    start = torch.arange(0, visibility.num_keys, tile, device=endpoints.device, dtype=torch.int32)
    zero = torch.zeros_like(endpoints[0])
    per_row = torch.zeros((*zero.shape, len(start)), dtype=torch.int32, device=endpoints.device)
    for first, last in zip((zero, *endpoints[1::2]), endpoints[::2], strict=True):
        per_row += (torch.minimum(last[..., None], start + tile) - torch.maximum(first[..., None], start)).clamp_min(0)
    per_row = torch.nn.functional.pad(per_row, (0, 0, 0, -per_row.shape[1] % tile))
    return per_row.unflatten(1, (-1, tile)).sum(dim=2)[:, None]


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool [b, 1, i, j] -> how many of each row are true, int32 [b, 1, i], and an order with them first, int32 [b, 1, i, j]."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _inside(endpoints: Tensor) -> Any:
    """mask_mod of FlexAttention. The endpoints are a tensor that it reads: numbers in its code would be compiled anew for each packing."""

    def mask_mod(sample: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        visible = key < endpoints[0, sample, row]
        for interval in range(1, len(endpoints), 2):
            visible |= (key >= endpoints[interval, sample, row]) & (key < endpoints[interval + 1, sample, row])
        return visible

    return mask_mod
