"""Who sees whom: the one description every mask, kernel plan and FLOP count is derived from.

Each query row sees a union of at most ``(num_endpoints + 1) / 2`` key intervals,

    visible = [0, F0) U [F1, F2) U [F3, F4),    0 <= F0 <= F1 <= F2 <= F3 <= F4 <= num_keys,

so that 1, 3 or 5 endpoints describe one, two or three intervals (the format of cuDNN's flex attention).

Shapes: b = samples, q = query rows, k = key columns, e = num_endpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(slots=True)
class Visibility:
    """Visible key intervals of every query row."""

    endpoints: Tensor
    """int32 [e, b, q], e in {1, 3, 5}, nondecreasing over e."""
    num_keys: int

    def dense(self) -> Tensor:
        """The boolean mask, bool [b, q, k]; True = visible."""
        keys = torch.arange(self.num_keys, device=self.endpoints.device, dtype=torch.int32)
        mask = keys < self.endpoints[0][..., None]
        for start, end in zip(self.endpoints[1::2], self.endpoints[2::2], strict=True):
            mask |= (keys >= start[..., None]) & (keys < end[..., None])
        return mask

    def num_visible_pairs(self) -> Tensor:
        """int64 scalar: visible (query, key) pairs of the micro-batch, one head."""
        endpoints = self.endpoints.to(torch.int64)
        return endpoints[0].sum() + (endpoints[2::2] - endpoints[1::2]).sum()

    def everything_visible(self) -> bool:
        """Whether every row sees every key: then a kernel needs no mask."""
        return int(self.num_visible_pairs()) == self.endpoints.shape[1] * self.endpoints.shape[2] * self.num_keys


def document_visibility(document_ids: Tensor) -> Visibility:
    """Bidirectional attention inside documents (the mask of masked diffusion; LLaDA2.0 eq. 4).

    Args:
        document_ids: int [b, l], contiguous runs; negative = padding, which sees nothing and is seen by nothing.
    """
    start, end = document_bounds(document_ids)
    real = document_ids >= 0
    zero = torch.zeros_like(start)
    return Visibility(torch.stack([zero, torch.where(real, start, zero), torch.where(real, end, zero)]), document_ids.shape[1])


def block_diffusion_visibility(document_ids: Tensor, block_size: int, block_index: Literal["document", "sample"]) -> Visibility:
    """Attention over [x_t ; x_0], 2l rows and keys (LLaDA2.0 eq. 3 with documents; masks.md 1.1).

    A noisy row sees its own noisy block and the clean tokens of strictly earlier blocks of its document; a clean row sees
    the clean tokens of its own and earlier blocks, and no noisy one. (Strictly: with the own block's clean tokens in view the
    loss would fall by itself.)

    Args:
        document_ids: int [b, l]; negative = padding, which sees nothing and is seen by nothing.
    """
    length = document_ids.shape[1]
    start, _ = document_bounds(document_ids)
    block_start, block_end = block_bounds(document_ids, block_size, block_index)
    zero = torch.zeros_like(start)
    noisy = torch.stack([zero, block_start, block_end, length + start, length + block_start])
    clean = torch.stack([zero, length + start, length + block_end, length + block_end, length + block_end])
    real = document_ids >= 0
    endpoints = torch.cat([torch.where(real, noisy, zero), torch.where(real, clean, zero)], dim=-1)
    return Visibility(endpoints, 2 * length)


def block_bounds(document_ids: Tensor, block_size: int, block_index: Literal["document", "sample"]) -> tuple[Tensor, Tensor]:
    """First position and one past the last position of each token's block, int32 [b, l] each; a block ends with its document."""
    start, end = document_bounds(document_ids)
    position = torch.arange(document_ids.shape[1], device=document_ids.device, dtype=torch.int32).expand_as(start)
    origin = start if block_index == "document" else torch.zeros_like(start)
    block_start = position - (position - origin) % block_size
    return torch.maximum(block_start, start), torch.minimum(block_start + block_size, end)


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First position and one past the last position of each token's document, int32 [b, l] each."""
    num_samples, length = document_ids.shape
    position = torch.arange(length, device=document_ids.device, dtype=torch.int32).expand(num_samples, length)
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    edge = torch.ones((num_samples, 1), dtype=torch.bool, device=document_ids.device)
    is_first, is_last = torch.cat([edge, changes], dim=1), torch.cat([changes, edge], dim=1)
    start = torch.where(is_first, position, 0).cummax(dim=1).values
    end = torch.where(is_last, position + 1, length).flip(1).cummin(dim=1).values.flip(1)
    return start.to(torch.int32), end.to(torch.int32)
