"""The description of which keys each query sees. Every mask, kernel plan and FLOP count is derived from it.

Each query row sees a union of at most ``(num_endpoints + 1) / 2`` key intervals,

    visible = [0, F0) U [F1, F2) U [F3, F4),    0 <= F0 <= F1 <= F2 <= F3 <= F4 <= num_keys,

so 1, 3 or 5 endpoints describe one, two or three intervals (the format of cuDNN's flex attention).

Shapes: b = samples, q = query rows, k = key columns, e = num_endpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from w1train.data.documents import block_bounds, document_bounds
from w1train.diffusion.philox import Purpose, random_words


@dataclass(slots=True)
class Visibility:
    """Visible key intervals of every query row."""

    endpoints: Tensor
    """int32 [e, b, q], e in {1, 3, 5}, nondecreasing over e."""
    num_keys: int
    scattered: Tensor | None = None
    """bool [b, q, k]: visible pairs besides the intervals (random annealing), which only dense kernels support."""

    def dense(self) -> Tensor:
        """Return the mask, bool [b, q, k]; True = visible."""
        mask = self.inside(torch.arange(self.num_keys, device=self.endpoints.device, dtype=torch.int32))
        return mask if self.scattered is None else mask | self.scattered

    def inside(self, keys: Tensor) -> Tensor:
        """Return which of some keys, int32 [j], are in the intervals of each row, bool [b, q, j]."""
        mask = keys < self.endpoints[0][..., None]
        for start, end in zip(self.endpoints[1::2], self.endpoints[2::2], strict=True):
            mask |= (keys >= start[..., None]) & (keys < end[..., None])
        return mask

    def pairs_per_row(self) -> Tensor:
        """Return the number of keys that each query row sees, int64 [b, q]."""
        if self.scattered is not None:
            return self.dense().sum(dim=-1)
        endpoints = self.endpoints.to(torch.int64)
        return endpoints[0] + (endpoints[2::2] - endpoints[1::2]).sum(dim=0)

    def num_visible_pairs(self) -> Tensor:
        """Return the number of visible (query, key) pairs of the micro-batch in one head, int64 scalar."""
        return self.pairs_per_row().sum()

    def everything_visible(self) -> bool:
        """Tell whether every row sees every key, so that a kernel needs no mask."""
        return int(self.num_visible_pairs()) == self.endpoints.shape[1] * self.endpoints.shape[2] * self.num_keys


def document_visibility(document_ids: Tensor) -> Visibility:
    """Return bidirectional attention inside documents, the mask of masked diffusion (LLaDA2.0, arXiv 2512.15745, eq. 4).

    Args:
        document_ids: int [b, l], in contiguous runs. A negative id is padding: padding sees no token, and no token sees padding.
    """
    start, end = document_bounds(document_ids)
    real = document_ids >= 0
    zero = torch.zeros_like(start)
    return Visibility(torch.stack([zero, torch.where(real, start, zero), torch.where(real, end, zero)]), document_ids.shape[1])


def causal_visibility(document_ids: Tensor, extent: int = 0) -> Visibility:
    """Return attention of each token to the tokens before it in its document, to itself, and to the ``extent`` tokens after it.

    Extent 0 is the autoregressive mask. If no document is longer than extent + 1, it is the mask of masked diffusion.

    Args:
        document_ids: int [b, l]; negative = padding, which sees nothing and which no token sees.
    """
    start, end = document_bounds(document_ids)
    behind = torch.arange(1, document_ids.shape[1] + 1, device=start.device, dtype=torch.int32) + extent
    zero = torch.zeros_like(start)
    real = document_ids >= 0
    return Visibility(
        torch.stack([zero, torch.where(real, start, zero), torch.where(real, torch.minimum(end, behind), zero)]), document_ids.shape[1]
    )


def scattered_visibility(document_ids: Tensor, ratio: float, seed: int, sample_indices: Tensor) -> Visibility:
    """Return the causal mask to which each later token of the document is added with probability ``ratio``, drawn anew for each sample
    (DiffuLLaMA's annealing, arXiv 2410.17891).

    Args:
        document_ids: int [b, l]; negative = padding.
        sample_indices: int64 [b].
    """
    num_samples, length = document_ids.shape
    rows = (sample_indices[:, None] * length + torch.arange(length, device=document_ids.device)).flatten()
    words = random_words(seed, rows, draw=0, purpose=Purpose.ATTENTION, num=length).reshape(num_samples, length, length)
    same_document = (document_ids[:, :, None] == document_ids[:, None, :]) & (document_ids >= 0)[:, :, None]
    causal = causal_visibility(document_ids)
    return Visibility(causal.endpoints, length, scattered=(words < int(ratio * (1 << 32))) & same_document)


def block_diffusion_visibility(
    document_ids: Tensor,
    block_size: int,
    block_index: Literal["document", "sample"],
    clean_attention: Literal["block_causal", "token_causal"] = "block_causal",
    noisy_attention: Literal["bidirectional", "causal"] = "bidirectional",
) -> Visibility:
    """Return attention over [x_t ; x_0], 2l rows and keys (LLaDA2.0, arXiv 2512.15745, eq. 3, inside documents).

    A noisy row sees its own noisy block (with ``causal`` up to itself) and the clean tokens of strictly earlier blocks of its document. If
    it saw the clean tokens of its own block, it could copy the tokens that it has to predict. A clean row sees the clean tokens of its own
    and earlier blocks (with ``token_causal`` up to itself), and no noisy token.

    Args:
        document_ids: int [b, l]; negative = padding, which sees nothing and which no token sees.
    """
    length = document_ids.shape[1]
    start, _ = document_bounds(document_ids)
    block_start, block_end = block_bounds(document_ids, block_size, block_index)
    zero = torch.zeros_like(start)
    behind = torch.arange(1, length + 1, device=start.device, dtype=torch.int32).expand_as(start)
    noisy_end = behind if noisy_attention == "causal" else block_end
    clean_end = length + (behind if clean_attention == "token_causal" else block_end)
    noisy = torch.stack([zero, block_start, noisy_end, length + start, length + block_start])
    clean = torch.stack([zero, length + start, clean_end, clean_end, clean_end])
    real = document_ids >= 0
    endpoints = torch.cat([torch.where(real, noisy, zero), torch.where(real, clean, zero)], dim=-1)
    return Visibility(endpoints, 2 * length)
