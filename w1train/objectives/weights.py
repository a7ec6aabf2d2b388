"""The registered weights of a loss: what the cross-entropy of each noised token is multiplied by.

A weight is computed before context parallelism distributes the positions of a sample, so it may depend on all tokens of the sample.

Shapes: b = samples, l = sequence_length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from w1train.diffusion.corruption import NoisyBatch
from w1train.diffusion.process import NoiseProcess

type Weight = Callable[[NoisyBatch, NoiseProcess], Tensor]
"""(batch, process) -> float32 [b, l], one weight for each output; only the weights at ``loss_mask`` are used."""


def elbo_weight(noisy: NoisyBatch, process: NoiseProcess) -> Tensor:
    """Return the weight of the process's ELBO at the t of each target: 1/t in linear masked diffusion."""
    return process.elbo_weight(noisy.target_timesteps)


def _inverse_fraction(noisy: NoisyBatch, _process: NoiseProcess) -> Tensor:
    """Return tokens / masked tokens of each target's segment: this is 1/t with the share of tokens that were really masked in the place of
    its expectation t."""
    segments = noisy.target_segments
    counts = torch.zeros((2, *segments.shape), device=segments.device)  # a segment's number is below l
    for count, chosen in zip(counts, (noisy.has_target, noisy.loss_mask), strict=True):
        count.scatter_add_(1, segments, chosen.float())
    return (counts[0] / counts[1].clamp_min(1.0)).gather(1, segments)


def _constant(noisy: NoisyBatch, _process: NoiseProcess) -> Tensor:
    return torch.ones_like(noisy.target_timesteps)


def _one_minus_t(noisy: NoisyBatch, _process: NoiseProcess) -> Tensor:
    """Return 1 - t (the scaling study of GIDD, arXiv 2512.10858)."""
    return 1.0 - noisy.target_timesteps


WEIGHTS: dict[str, Weight] = {
    "inverse_t": elbo_weight,
    "inverse_fraction": _inverse_fraction,
    "constant": _constant,
    "one_minus_t": _one_minus_t,
}
"""The weight of each value of diffusion.weight."""
