"""Masks with an exact number of tokens instead of a probability for each token (LLaDA, arXiv 2502.09992, eq. 6; the draws of VRPO,
arXiv 2505.19223).

If l of N tokens are masked, with l uniform in 1..N, the mean of N / l times the sum of their cross-entropies is that of 1/t with
independent masks, and varies less: the number of masked tokens does not vary at a given t.

Shapes: b = samples, l = sequence_length, g = segments per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noise_exactly(can_be_noised: Tensor, segments: Tensor, segment_timesteps: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noised tokens, bool [b, l], and each segment's share of them, float64 [b, g].

    Of N tokens, t N (rounded up, and at least one) are noised: those with the smallest words. A segment without a token that can be noised
    keeps its t.

    Args:
        can_be_noised: bool [b, l].
        segments: int64 [b, l], the segment of each token.
        segment_timesteps: float64 [b, g], t.
        words: int64 [b, l] below 2^32.
    """
    totals = torch.zeros(segment_timesteps.shape, dtype=torch.int64, device=segments.device)
    totals.scatter_add_(1, segments, can_be_noised.long())
    counts = (segment_timesteps * totals).ceil().long().clamp_min(1).minimum(totals)
    # Tokens that can be noised come before the others of their segment, in the order of their words. Equal words keep the order of places,
    # which is the same on every device.
    order = ((segments * 2 + ~can_be_noised << 32) + words).argsort(dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    sizes = torch.zeros_like(totals).scatter_add_(1, segments, torch.ones_like(segments))
    rank = place - (sizes.cumsum(dim=1) - sizes).gather(1, segments)
    noised = can_be_noised & (rank < counts.gather(1, segments))
    return noised, torch.where(totals > 0, counts / totals.clamp_min(1), segment_timesteps)
