"""The registered weights of a loss: what the loss of each token is multiplied by.

A weight is computed before context parallelism distributes the positions of a sample, so it may depend on all tokens of the sample.

Shapes: b = samples, l = sequence_length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.corruption import NoisyBatch
from w1train.objectives.cart import cart_weight
from w1train.objectives.row_loss import RowLoss
from w1train.objectives.signal_weights import gidd_dynamic_weight, log_snr_weight

type Weight = Callable[[NoisyBatch, RowLoss], Tensor]
"""(batch, trained loss) -> [b, l], one weight for each output; only the weights at ``loss_mask`` are used."""


def elbo_weight(noisy: NoisyBatch, loss: RowLoss) -> Tensor:
    """Return the weight that makes the loss the bound at the t of each target: 1/t in linear masked diffusion."""
    return loss.elbo_weight(noisy.target_timesteps, noisy.target_inputs, noisy.targets)


def _inverse_fraction(noisy: NoisyBatch, _loss: RowLoss) -> Tensor:
    """Return tokens / noised tokens of each target's segment: this is 1/t with the share of tokens that were really masked in the place of
    its expectation t."""
    segments = noisy.target_segments
    counts = torch.zeros((2, *segments.shape), device=segments.device)  # a segment's number is below l
    for count, chosen in zip(counts, (noisy.has_target, noisy.target_is_noised), strict=True):
        count.scatter_add_(1, segments, chosen.float())
    return (counts[0] / counts[1].clamp_min(1.0)).gather(1, segments)


def _constant(noisy: NoisyBatch, _loss: RowLoss) -> Tensor:
    return torch.ones_like(noisy.target_timesteps)


def _one_minus_t(noisy: NoisyBatch, _loss: RowLoss) -> Tensor:
    """Return 1 - t (Dream, arXiv 2508.15487; the scaling study of GIDD, arXiv 2512.10858)."""
    return 1.0 - noisy.target_timesteps


WEIGHTS: dict[str, Weight] = {
    "inverse_t": elbo_weight,
    "elbo": elbo_weight,
    "inverse_fraction": _inverse_fraction,
    "constant": _constant,
    "one_minus_t": _one_minus_t,
    "cart": cart_weight,
    "gidd_dynamic": gidd_dynamic_weight,
    "log_snr": log_snr_weight,
}
"""The weight of each value of diffusion.weight."""

LARGEST_WEIGHTS = {"gidd_dynamic": 2.0, "log_snr": 1000.0}
"""The limit of weights whose publication has a limit, where diffusion.weight_max is null."""


def trained_weights(config: DiffusionConfig, weight: Weight, noisy: NoisyBatch, loss: RowLoss) -> Tensor:
    """Return the weights within their limits, and 0 at tokens that are not trained, float32 [b, l]."""
    weights = weight(noisy, loss).float()
    largest = LARGEST_WEIGHTS.get(config.weight) if config.weight_max is None else config.weight_max
    if largest is not None or config.weight_min > 0:
        weights = weights.clamp(config.weight_min, largest)
    return torch.where(_is_trained(config, noisy, loss), weights, 0.0)


def _is_trained(config: DiffusionConfig, noisy: NoisyBatch, loss: RowLoss) -> Tensor:
    """Return the tokens of diffusion.loss_positions, bool [b, l]."""
    positions = loss.positions if config.loss_positions == "auto" else config.loss_positions
    if positions == "all":
        return torch.ones_like(noisy.target_is_noised)
    return noisy.target_is_noised & (noisy.target_inputs != noisy.targets) if positions == "changed" else noisy.target_is_noised
