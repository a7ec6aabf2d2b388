"""The noising probability of Duo's schedule (arXiv 2506.10892, eq. 10), by a table in float64.

The one-hot vector of a token, times the signal, plus standard normal noise times the noise level, has its largest element in another place
than the token's with some probability. Let mu = exp(-gamma / 2) be the ratio of signal to noise. For K ids this probability is

    integral of phi(z - mu) (1 - Phi(z)^(K - 1)) dz,

and the id of the largest element is distributed as if uniform noise had replaced the token with this probability times K / (K - 1).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_NUM_INTERVALS = 4096
"""Intervals of t in the table. Cubic interpolation with exact derivatives has an error below 1e-14 at the range of gamma of Duo."""
_STEP = 0.01
"""Distance of the points of the integral over z. The integrand is a Gaussian times a smooth function, for which equal steps converge
exponentially: halving this step changes the result by less than 1e-14."""


def argmax_noising_probability(num_ids: int, gamma_min: float, gamma_max: float, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noising probability at each t in [0, 1], where gamma = gamma_min + (gamma_max - gamma_min) t, and its derivative with
    respect to t, both in the shape and type of ``timesteps``."""
    table = _table_on(num_ids, gamma_min, gamma_max, timesteps.device)
    place = timesteps.double() * _NUM_INTERVALS
    interval = place.detach().long().clamp(0, _NUM_INTERVALS - 1)
    x = place - interval
    (left, right), (left_rate, right_rate) = ((row[interval], row[interval + 1]) for row in table)
    # Cubic Hermite interpolation, with derivatives per interval.
    rise, left_rate, right_rate = right - left, left_rate / _NUM_INTERVALS, right_rate / _NUM_INTERVALS
    bend, twist = 3 * rise - 2 * left_rate - right_rate, left_rate + right_rate - 2 * rise
    value = left + x * (left_rate + x * (bend + x * twist))
    rate = (left_rate + x * (2 * bend + 3 * x * twist)) * _NUM_INTERVALS
    return value.to(timesteps.dtype), rate.to(timesteps.dtype)


@lru_cache(maxsize=16)
def _table_on(num_ids: int, gamma_min: float, gamma_max: float, device: torch.device) -> Tensor:
    """Return the noising probability and its derivative at the borders of the intervals, float64 [2, intervals + 1]."""
    gammas = torch.linspace(gamma_min, gamma_max, _NUM_INTERVALS + 1, dtype=torch.float64)
    value, rate = noising_probability_at(num_ids, gammas)
    return torch.stack([value, rate * (gamma_max - gamma_min)]).to(device)


def noising_probability_at(num_ids: int, gammas: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noising probability at each gamma, and its derivative with respect to gamma, float64 [n]."""
    signal = torch.exp(-gammas / 2)
    points = torch.arange(-10.0, float(signal.max()) + 10, _STEP, dtype=torch.float64)
    is_not_largest = -torch.expm1((num_ids - 1) * torch.special.log_ndtr(points))
    weights = num_ids / (num_ids - 1) * _STEP / math.sqrt(2 * math.pi) * is_not_largest
    values, rates = [], []
    for part in signal.split(256):  # the table of a whole range would be 100 MB
        distances = points - part[:, None]
        densities = torch.exp(-0.5 * distances**2)
        values.append(densities @ weights)
        rates.append((distances * densities) @ weights * (-part / 2))
    return torch.cat(values), torch.cat(rates)
