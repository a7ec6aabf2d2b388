"""Weights that are made of the bound's weight and of the ratio of signal to noise.

Where the noise does not change with t, both weights are 0, as the bound's is: near both ends of a log-SNR mixture, and at t = 1 of the
cosine schedule. The ratios would be NaN there.

Shapes: b = samples, l = sequence_length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.diffusion.corruption import NoisyBatch
from w1train.objectives.row_loss import RowLoss


def log_snr_weight(noisy: NoisyBatch, loss: RowLoss) -> Tensor:
    """Return the bound's weight per unit of lambda = log(alpha / (1 - alpha)) without the division by the density of lambda, [b, l]: the
    training weight of GIDD's scaling study (arXiv 2512.10858). In linear masked diffusion the weight of a cross-entropy is 1 - t."""
    timesteps = noisy.target_timesteps.double()
    process = loss.process
    rate = -process.alpha_rate(timesteps) / (process.alpha(timesteps) * process.noising_probability(timesteps))
    return torch.where(rate > 0, loss.elbo_weight(timesteps, noisy.target_inputs, noisy.targets) / rate, 0.0)


def gidd_dynamic_weight(noisy: NoisyBatch, loss: RowLoss) -> Tensor:
    """Return the bound's weight divided by that of a token that noise has put in the place of another, [b, l] (the dynamic weights of GIDD,
    arXiv 2503.04482, section 3.4, with the exact ratios): 1 at a wrong token, 2 at a mask if gamma is 1, and near 0 at a clean token."""
    timesteps, process = noisy.target_timesteps.double(), loss.process
    # All ordinary ids have the same noise, so that of the target stands for that of every wrong token.
    of_wrong = process.jump_rate(timesteps, noisy.targets) / process.noise(timesteps, noisy.targets)
    return torch.where(of_wrong > 0, process.bound_weight(timesteps, noisy.target_inputs, noisy.targets) / of_wrong, 0.0)
