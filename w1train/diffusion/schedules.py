"""Schedules: how the probability that noise keeps a token falls with the timestep t, for processes that take any of them.

alpha_t is the probability that a token is kept, and 1 - alpha_t the noising probability. Both are computed without the rounding of a
difference, because the weights of losses divide by them.

The last bit of a sine or an exponential in float64 may differ between CPU and GPU. The noise of a token then differs between them if the
token's random word is just at the threshold, which happens to one of about 10^15 tokens. The linear schedule has no such function.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.gaussian_argmax import argmax_noising_probability
from w1train.diffusion.noise_ids import NoiseIds

LARGEST_LOG_SNR = 9.0
"""The largest |log(alpha / (1 - alpha))| at which GIDD's scaling study (arXiv 2512.10858) trains."""


class Schedule(ABC):
    """alpha as a function of t. All methods return tensors in the shape of their argument."""

    ends_are_noise_and_text: bool = True
    """True: t = 0 is text and t = 1 is noise alone, where logarithms of the noise have no bound. False: both ends are between these."""

    @abstractmethod
    def alpha(self, timesteps: Tensor) -> Tensor:
        """Return the probability that noise keeps a token."""

    @abstractmethod
    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        """Return the derivative of alpha with respect to t."""

    @abstractmethod
    def noising_probability(self, timesteps: Tensor) -> Tensor:
        """Return 1 - alpha."""

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        """Return the t with this noising probability."""
        return solve_timestep(self.noising_probability, noising_probability)


@dataclass(frozen=True, slots=True)
class Linear(Schedule):
    """alpha = 1 - t (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992)."""

    def alpha(self, timesteps: Tensor) -> Tensor:
        return 1 - timesteps

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return -torch.ones_like(timesteps)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return noising_probability


@dataclass(frozen=True, slots=True)
class Cosine(Schedule):
    """alpha = 1 - cos(pi (1 - t) / 2) (MD4, arXiv 2406.04329, table 1), which is 2 sin^2(pi (1 - t) / 4)."""

    def alpha(self, timesteps: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 4 * (1 - timesteps)) ** 2

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - timesteps))

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * timesteps)

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(noising_probability)


@dataclass(frozen=True, slots=True)
class Polynomial(Schedule):
    """alpha = 1 - t^k (MD4, arXiv 2406.04329, table 1)."""

    power: float

    def alpha(self, timesteps: Tensor) -> Tensor:
        return -torch.expm1(self.power * torch.log(timesteps))

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return -self.power * timesteps ** (self.power - 1)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return timesteps**self.power

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return noising_probability ** (1 / self.power)


@dataclass(frozen=True, slots=True)
class LogLinear(Schedule):
    """alpha = 1 - (1 - epsilon) t: the total noise -log alpha is log-linear (SEDD, arXiv 2310.16834, appendix C.1)."""

    epsilon: float

    def alpha(self, timesteps: Tensor) -> Tensor:
        return 1 - (1 - self.epsilon) * timesteps

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return (self.epsilon - 1) * torch.ones_like(timesteps)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return (1 - self.epsilon) * timesteps

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return noising_probability / (1 - self.epsilon)


@dataclass(frozen=True, slots=True)
class Scaled(Schedule):
    """(1 - 2 epsilon) alpha + epsilon, with which MD4 (arXiv 2406.04329) keeps alpha away from 0 and 1."""

    schedule: Schedule
    epsilon: float

    def alpha(self, timesteps: Tensor) -> Tensor:
        return self.epsilon + (1 - 2 * self.epsilon) * self.schedule.alpha(timesteps)

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return (1 - 2 * self.epsilon) * self.schedule.alpha_rate(timesteps)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return self.epsilon + (1 - 2 * self.epsilon) * self.schedule.noising_probability(timesteps)

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        of_schedule = (noising_probability - self.epsilon) / (1 - 2 * self.epsilon)
        return self.schedule.timestep_at(of_schedule.clamp(0, 1))


@dataclass(frozen=True, slots=True)
class Geometric(Schedule):
    """alpha = exp(-sigma), where sigma grows from sigma_min to sigma_max geometrically (SEDD, arXiv 2310.16834, appendix C.1)."""

    sigma_min: float
    sigma_max: float
    ends_are_noise_and_text = False

    def _sigma(self, timesteps: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(timesteps * math.log(self.sigma_max / self.sigma_min))

    def alpha(self, timesteps: Tensor) -> Tensor:
        return torch.exp(-self._sigma(timesteps))

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return -math.log(self.sigma_max / self.sigma_min) * self._sigma(timesteps) * self.alpha(timesteps)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return -torch.expm1(-self._sigma(timesteps))

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        sigma = -torch.log1p(-noising_probability)
        return (torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class GaussianArgmax(Schedule):
    """The schedule of the argmax of a one-hot vector under Gaussian noise (Duo, arXiv 2506.10892, eq. 10), whose log-SNR -gamma falls
    linearly with t."""

    num_ids: int
    gamma_min: float
    gamma_max: float
    ends_are_noise_and_text = False

    def alpha(self, timesteps: Tensor) -> Tensor:
        return 1 - self.noising_probability(timesteps)

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return -argmax_noising_probability(self.num_ids, self.gamma_min, self.gamma_max, timesteps)[1]

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return argmax_noising_probability(self.num_ids, self.gamma_min, self.gamma_max, timesteps)[0]


def solve_timestep(noising_probability: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Return the t in [0, 1] at which a growing noising probability has the wanted values, by 60 halvings of the interval: the error is
    below 1e-16. If a value is beyond the probabilities that the process reaches, the result is the nearest end."""
    low, high = torch.zeros_like(wanted, dtype=torch.float64), torch.ones_like(wanted, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        is_below = noising_probability(middle) < wanted
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return high.to(wanted.dtype)


def log_snr_quadrature(fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Return t and dt/du for fractions u in [0, 1] at which log(t / (1 - t)) grows linearly from -9 to 9.

    Bounds of uniform and hybrid noise have terms such as sqrt(t) and log t near both ends, so that an integral over t by equal steps
    converges slowly. Over this u the integrand is smooth.
    """
    timesteps = torch.sigmoid(LARGEST_LOG_SNR * (2 * fractions - 1))
    return timesteps, 2 * LARGEST_LOG_SNR * timesteps * (1 - timesteps)


def _scaled(schedule: Schedule, config: DiffusionConfig) -> Schedule:
    return Scaled(schedule, config.schedule_epsilon) if config.schedule_epsilon > 0 else schedule


SCHEDULES: dict[str, Callable[[DiffusionConfig], Schedule]] = {
    "linear": lambda config: _scaled(Linear(), config),
    "cosine": lambda config: _scaled(Cosine(), config),
    "polynomial": lambda config: _scaled(Polynomial(config.schedule_power), config),
    "log_linear": lambda config: LogLinear(config.schedule_epsilon),
    "geometric": lambda config: Geometric(config.schedule_sigma_min, config.schedule_sigma_max),
    "gaussian_argmax": lambda config: GaussianArgmax(NoiseIds.of(config).count, config.schedule_gamma_min, config.schedule_gamma_max),
}
"""The schedule of each value of diffusion.noise_schedule."""
