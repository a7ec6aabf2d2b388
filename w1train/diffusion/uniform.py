"""Uniform diffusion: noise replaces a token by one that is drawn from all ids alike (D3PM, arXiv 2107.03006; SEDD, arXiv 2310.16834; UDLM,
arXiv 2412.10193; Duo, arXiv 2506.10892)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from w1train.diffusion.noise_ids import NoiseIds
from w1train.diffusion.process import Bound, NoiseProcess
from w1train.diffusion.schedules import Schedule, log_snr_quadrature


@dataclass(frozen=True, slots=True)
class UniformProcess(NoiseProcess):
    """Uniform diffusion: c_t(v) = (1 - alpha_t) / K for each of K ids."""

    ids: NoiseIds
    schedule: Schedule
    name: ClassVar[str] = "uniform diffusion"
    words_per_token: ClassVar[int] = 2
    predicts_every_token: ClassVar[bool] = True
    bound: ClassVar[Bound] = "kl_is"
    needs_noise_ids: ClassVar[bool] = True
    schedules: ClassVar[tuple[str, ...]] = ("linear", "cosine", "polynomial", "log_linear", "geometric", "gaussian_argmax")

    def alpha(self, timesteps: Tensor) -> Tensor:
        return self.schedule.alpha(timesteps)

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return self.schedule.alpha_rate(timesteps)

    def word_noise(self, timesteps: Tensor) -> Tensor:
        return self.noising_probability(timesteps) / self.ids.count

    def noise(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.word_noise(timesteps) * self.ids.contains(ids)

    def noise_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return -self.alpha_rate(timesteps) / self.ids.count * self.ids.contains(ids)

    def jump_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Return -alpha' / (K alpha), in which the difference of NoiseProcess.jump_rate is already taken."""
        return -self.alpha_rate(timesteps) / (self.ids.count * self.alpha(timesteps)) * self.ids.contains(ids)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return self.schedule.noising_probability(timesteps)

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return self.schedule.timestep_at(noising_probability)

    def quadrature(self, fractions: Tensor) -> tuple[Tensor, Tensor]:
        if self.schedule.ends_are_noise_and_text:
            return log_snr_quadrature(fractions)
        return fractions, torch.ones_like(fractions)

    def replacements(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        return self.ids.draw(words[:, 1])

    def is_noised(self, ids: Tensor) -> Tensor:
        """Return True everywhere, because any token may be noise."""
        return torch.ones_like(ids, dtype=torch.bool)
