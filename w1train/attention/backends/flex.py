"""torch's FlexAttention: Triton kernels that skip tiles in which no key is visible.

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
    """FlexAttention, compiled once for all packings: the kernel reads documents and blocks from tensors, so they are not in its code."""

    name = "flex"

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """Return why FlexAttention cannot run. On the CPU torch has no backward pass of it."""
        return missing_cuda(device, _LOWEST_CAPABILITY)

    def prepare(self, visibility: Visibility) -> BlockMask:
        """Return the tiles to visit, with the rule inside tiles of which a part is visible."""
        return interval_block_mask(visibility)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: BlockMask, scale: float | None = None) -> Tensor:
        """Compute AttentionBackend.attend. The kernel itself writes zeros in rows that see nothing."""
        grouped = query.shape[1] != key.shape[1]
        return compiled_flex_attention()(query, key, value, block_mask=plan, scale=scale, enable_gqa=grouped)


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Return the compiled function. It is compiled for fixed shapes, those of the recipe, because kernels that know their shapes are
    faster."""
    return torch.compile(flex_attention, dynamic=False)


def interval_block_mask(visibility: Visibility, tile: int = TILE) -> BlockMask:
    """Return FlexAttention's block mask, from the number of visible pairs of each tile. This takes b * q * j numbers, where a dense mask
    would take b * q * k numbers."""
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
    """Return the visible pairs of each tile, int64 [b, 1, i, j]. Tiles that extend beyond the last row or key are never full."""
    endpoints = visibility.endpoints
    start = torch.arange(0, visibility.num_keys, tile, device=endpoints.device, dtype=torch.int32)
    zero = torch.zeros_like(endpoints[0])
    per_row = torch.zeros((*zero.shape, len(start)), dtype=torch.int32, device=endpoints.device)
    for first, last in zip((zero, *endpoints[1::2]), endpoints[::2], strict=True):
        per_row += (torch.minimum(last[..., None], start + tile) - torch.maximum(first[..., None], start)).clamp_min(0)
    per_row = torch.nn.functional.pad(per_row, (0, 0, 0, -per_row.shape[1] % tile))
    return per_row.unflatten(1, (-1, tile)).sum(dim=2)[:, None]


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tiles of each row are true, int32 [b, 1, i], and an order with these first, int32 [b, 1, i, j]."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _inside(endpoints: Tensor) -> Any:
    """Return FlexAttention's mask_mod. It reads the endpoints from a tensor, because numbers in its code would need a new compilation for
    each packing."""

    def mask_mod(sample: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        visible = key < endpoints[0, sample, row]
        for interval in range(1, len(endpoints), 2):
            visible |= (key >= endpoints[interval, sample, row]) & (key < endpoints[interval + 1, sample, row])
        return visible

    return mask_mod
