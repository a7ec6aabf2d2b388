"""The mixture of uniform noise and masks whose shares follow the signal-to-noise ratio (GIDD's scaling study, arXiv 2512.10858).

lambda = log(alpha / (1 - alpha)) is between -9 and 9, and alpha = 1 - t between these ends. The share sigmoid(a lambda + b) of the noise is
uniform, and the rest is on the mask token: a large b gives uniform noise, and a large -b masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from w1train.diffusion.mixture import MixtureProcess
from w1train.diffusion.schedules import LARGEST_LOG_SNR

_FIRST = 1 / (1 + math.exp(LARGEST_LOG_SNR))
"""The smallest noising probability, 1.2e-4; the largest is 1 minus this number."""


@dataclass(frozen=True, slots=True)
class LogSnrProcess(MixtureProcess):
    """The mixture with slope a and shift b."""

    slope: float
    shift: float
    name: ClassVar[str] = "diffusion with a log-SNR mixture of noise"
    mass_field: ClassVar[str] = "log_snr_slope"
    mass_remedy: ClassVar[str | None] = "diffusion.log_snr_slope=1, or less"

    def _logit(self, timesteps: Tensor) -> Tensor:
        """Return a lambda + b, in the shape of ``timesteps``."""
        return self.shift - self.slope * torch.logit(self.noising_probability(timesteps))

    def _logit_rate(self, timesteps: Tensor) -> Tensor:
        noising = self.noising_probability(timesteps)
        return self.slope * self.alpha_rate(timesteps) / (noising * (1 - noising))

    def alpha(self, timesteps: Tensor) -> Tensor:
        return (1 - timesteps).clamp(_FIRST, 1 - _FIRST)

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return -((timesteps > _FIRST) & (timesteps < 1 - _FIRST)).to(timesteps.dtype)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return timesteps.clamp(_FIRST, 1 - _FIRST)

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return noising_probability

    def mask_noise(self, timesteps: Tensor) -> Tensor:
        return self.noising_probability(timesteps) * torch.sigmoid(-self._logit(timesteps))

    def uniform_noise(self, timesteps: Tensor) -> Tensor:
        return self.noising_probability(timesteps) * torch.sigmoid(self._logit(timesteps))

    def mask_noise_rate(self, timesteps: Tensor) -> Tensor:
        growth = -self.alpha_rate(timesteps) / self.noising_probability(timesteps)
        return self.mask_noise(timesteps) * (growth - torch.sigmoid(self._logit(timesteps)) * self._logit_rate(timesteps))

    def uniform_noise_rate(self, timesteps: Tensor) -> Tensor:
        growth = -self.alpha_rate(timesteps) / self.noising_probability(timesteps)
        return self.uniform_noise(timesteps) * (growth + torch.sigmoid(-self._logit(timesteps)) * self._logit_rate(timesteps))

    def mask_jump_rate(self, timesteps: Tensor) -> Tensor:
        return self.mask_noise(timesteps) * self._odds_rate(timesteps) * (1 + self.slope * torch.sigmoid(self._logit(timesteps)))

    def uniform_jump_rate(self, timesteps: Tensor) -> Tensor:
        return self.uniform_noise(timesteps) * self._odds_rate(timesteps) * (1 - self.slope * torch.sigmoid(-self._logit(timesteps)))

    def _odds_rate(self, timesteps: Tensor) -> Tensor:
        """Return the derivative of log((1 - alpha) / alpha) with respect to t."""
        return -self.alpha_rate(timesteps) / (self.alpha(timesteps) * self.noising_probability(timesteps))
