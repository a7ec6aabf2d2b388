"""The bound of a whole process: an integral over t, and the two end terms where the integral does not reach from text to noise alone.

    -log p(x) <= integral over t from t_0 to t_1 + E[-log p(x | z_0)] + KL(q(z_1 | x) || p(z_1))

where z_0 and z_1 are the noisy text at t_0 and t_1. The model computes the first end term (w1train/objectives/reconstruction.py). In
discrete time the integral is the sum over the steps from t_0 = 0 to t_1 = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.process import NoiseProcess
from w1train.diffusion.processes import noise_process
from w1train.diffusion.timesteps import on_a_step
from w1train.objectives.cross_entropy_loss import PlainCrossEntropy
from w1train.objectives.finite_kl import FiniteKlLoss
from w1train.objectives.losses import bound_of


@dataclass(frozen=True, slots=True)
class Integral:
    """The points of a quadrature: the bound without its end terms is the mean over the points of rate * the ELBO at t."""

    timesteps: tuple[float, ...]
    rates: tuple[float, ...]
    """dt/du of each point, for equal steps of u."""
    first: float
    """t_0."""
    last: float
    """t_1."""


def integral_of(config: DiffusionConfig, fractions: Sequence[float]) -> Integral:
    """Return the quadrature with the given fractions u, the midpoints of equal steps."""
    points = torch.tensor(fractions, dtype=torch.float64)
    if isinstance(bound_of(config), FiniteKlLoss):
        return Integral(tuple(on_a_step(config, points).tolist()), (1.0,) * len(points), 0.0, 1.0)
    process = noise_process(config)
    if process.learns_rates:
        # The loss itself has the end term at t_min, so what is below t_min would be counted twice.
        width = 1 - config.t_min
        return Integral(tuple((config.t_min + width * points).tolist()), (width,) * len(points), config.t_min, 1.0)
    quadrature = process.quadrature
    timesteps, rates = quadrature(points)
    ends, _ = quadrature(torch.tensor([0.0, 1.0], dtype=torch.float64))
    return Integral(tuple(timesteps.tolist()), tuple(rates.tolist()), *ends.tolist())


def is_exact_at_the_end(config: DiffusionConfig) -> bool:
    """Return whether the ELBO at t = 1 is the likelihood if tokens are predicted one at a time: where every token is masked, and has the
    weight 1."""
    end = torch.ones(1, dtype=torch.float64)
    bound = bound_of(config)
    return isinstance(bound, PlainCrossEntropy) and bound.process.elbo_weight(end).item() == 1


def needs_reconstruction(process: NoiseProcess, first: float) -> bool:
    """Return whether noise replaces tokens at t_0, and the loss does not have the end term itself (learned rates)."""
    return not process.learns_rates and process.noising_probability(torch.tensor([first], dtype=torch.float64)).item() > 0


def prior_divergence(process: NoiseProcess, last: float, num_ids: int, mask_token_id: int) -> float:
    """Return KL(q(z_1 | x) || p(z_1)) of one token in nats. p is the noise at t_1 of an id that is drawn from all ``num_ids`` ids alike,
    which is what a model that knows nothing of the text predicts. (Noise alone would give the probability 0 to tokens that are kept.)"""
    time, mask = torch.tensor([last], dtype=torch.float64), torch.tensor([mask_token_id])
    alpha, word = process.alpha(time).item(), process.word_noise(time).item()
    if alpha == 0:
        return 0.0
    of_token = (alpha + word) * math.log((alpha + word) / (word + alpha / num_ids))
    if word == 0:
        return of_token
    num_others = (process.noising_probability(time) - process.noise(time, mask)).item() / word - 1
    return of_token + num_others * word * math.log(word / (word + alpha / num_ids))
