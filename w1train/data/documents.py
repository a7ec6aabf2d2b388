"""Functions that find where the documents and blocks of a packed sample begin and end.

Shapes: b = samples, l = sequence_length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first position and one past the last of each token's document, int32 [b, l] each."""
    num_samples, length = document_ids.shape
    position = torch.arange(length, device=document_ids.device, dtype=torch.int32).expand(num_samples, length)
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    edge = torch.ones((num_samples, 1), dtype=torch.bool, device=document_ids.device)
    is_first, is_last = torch.cat([edge, changes], dim=1), torch.cat([changes, edge], dim=1)
    start = torch.where(is_first, position, 0).cummax(dim=1).values
    end = torch.where(is_last, position + 1, length).flip(1).cummin(dim=1).values.flip(1)
    return start.to(torch.int32), end.to(torch.int32)


def sums_of_documents(values: Tensor, document_ids: Tensor) -> Tensor:
    """Return for each token the sum of ``values``, of integers or bool [b, l], over the token's document; int64 [b, l]."""
    start, end = document_bounds(document_ids)
    before = torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))
    return before.gather(1, end.long()) - before.gather(1, start.long())


def block_bounds(document_ids: Tensor, block_size: int, block_index: Literal["document", "sample"]) -> tuple[Tensor, Tensor]:
    """Return the first position and one past the last of each token's block, int32 [b, l] each; a block ends with its document."""
    start, end = document_bounds(document_ids)
    position = torch.arange(document_ids.shape[1], device=document_ids.device, dtype=torch.int32).expand_as(start)
    origin = start if block_index == "document" else torch.zeros_like(start)
    block_start = position - (position - origin) % block_size
    return torch.maximum(block_start, start), torch.minimum(block_start + block_size, end)


def block_ordinals(document_ids: Tensor, block_size: int, block_index: Literal["document", "sample"]) -> Tensor:
    """Return the number of each token's block inside its sample, counted from 0; int64 [b, l]."""
    start, _ = block_bounds(document_ids, block_size, block_index)
    position = torch.arange(document_ids.shape[1], device=document_ids.device, dtype=torch.int32)
    return (start == position).cumsum(dim=1) - 1
