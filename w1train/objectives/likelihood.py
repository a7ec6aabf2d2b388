"""The objective and what is logged of it, as sums: only sums can be added over micro-batches and ranks.

Every quantity is (sum of a numerator) / (sum of a denominator) over the global batch. A mean per rank averaged over
ranks is another number whenever the ranks' token counts differ (masks.md G12).

Shapes: m = positions where a loss is taken, in the order of ``NoisyBatch.loss_mask`` flattened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.corruption import NoisyBatch


@dataclass(slots=True, frozen=True)
class LossSums:
    """Sums over a micro-batch, in one vector so that one all-reduce carries them all."""

    values: Tensor
    """float64 [NUM_SCALARS + 2 * num_t_bins]."""
    num_t_bins: int

    NUM_SCALARS = 7  # weighted, elbo, cross_entropy, num_masked, num_tokens, next_cross_entropy, num_next

    def metrics(self, config: DiffusionConfig) -> dict[str, Any]:
        """Global means, from sums that were already added over micro-batches and ranks."""
        weighted, elbo, cross_entropy, num_masked, num_tokens, following, num_next = self.values[: self.NUM_SCALARS].tolist()
        denominator = num_tokens if config.normalizer == "tokens" else num_masked
        bins = self.values[self.NUM_SCALARS :].reshape(2, self.num_t_bins).tolist()
        autoregressive = {"autoregressive_loss": following / max(num_next, 1.0)} if config.autoregressive_weight > 0 else {}
        return {
            "loss": (weighted + config.autoregressive_weight * following) / max(denominator, 1.0),
            "elbo": elbo / max(num_tokens, 1.0),
            "masked_cross_entropy": cross_entropy / max(num_masked, 1.0),
            "mask_ratio": num_masked / max(num_tokens, 1.0),
            "loss_by_t": [total / count if count else None for total, count in zip(*bins, strict=True)],
            **autoregressive,
        }


def denominator(config: DiffusionConfig, noisy: NoisyBatch) -> Tensor:
    """float64 scalar: this micro-batch's part of the objective's global denominator."""
    return (noisy.num_tokens if config.normalizer == "tokens" else noisy.loss_mask.sum()).double()


def diffusion_loss(
    cross_entropy: Tensor, noisy: NoisyBatch, config: DiffusionConfig, num_t_bins: int, next_cross_entropy: Tensor | None = None
) -> tuple[Tensor, LossSums]:
    """The weighted sum to differentiate (not yet divided), and the sums to log.

    Args:
        cross_entropy: float32 [m], nats, at the positions of ``noisy.loss_mask``.
        next_cross_entropy: float32, nats, at the positions of ``noisy.next_mask``, of the clean stream; None without such a loss.
    """
    timesteps, weights = noisy.loss_timesteps_and_weights()
    weighted = (cross_entropy * weights).sum()
    if next_cross_entropy is None:
        next_cross_entropy = cross_entropy.new_zeros(0)
    else:
        weighted = weighted + config.autoregressive_weight * next_cross_entropy.sum()
    with torch.no_grad():
        # Nothing here asks a GPU for a value (bincount would): the host would wait for the forward pass before it launches the backward.
        # Double: float32 sums of 10^6 terms would make the logged loss depend on the order of the ranks.
        detached, inverse = cross_entropy.double(), 1.0 / timesteps.double()
        scalars = torch.stack(
            [
                (detached * weights.double()).sum(),
                (detached * inverse).sum(),
                detached.sum(),
                noisy.loss_mask.sum().double(),
                noisy.num_tokens.double(),
                next_cross_entropy.double().sum(),
                detached.new_full((), len(next_cross_entropy)),
            ]
        )
        bins = (timesteps * num_t_bins).long().clamp(0, num_t_bins - 1)
        totals = detached.new_zeros(num_t_bins).index_add_(0, bins, detached)
        counts = torch.zeros_like(totals).index_add_(0, bins, torch.ones_like(detached))
    return weighted, LossSums(torch.cat([scalars, totals, counts]), num_t_bins)
