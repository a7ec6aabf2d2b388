"""Noise of a fixed share of random tokens beside masks, from which a model learns to write masked tokens and to correct wrong tokens
(LLaDA2.1, arXiv 2602.08676, which calls both mask-to-token and token-to-token). The report does not give the share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from w1train.diffusion.mixture import MixtureProcess
from w1train.diffusion.schedules import Schedule


@dataclass(frozen=True, slots=True)
class TokenToTokenProcess(MixtureProcess):
    """Noise that puts a random token in the place of a fixed share of the noised tokens, and the mask token in the place of the others."""

    uniform_share: float
    schedule: Schedule
    name: ClassVar[str] = "masked diffusion with token correction"
    schedules: ClassVar[tuple[str, ...]] = ("linear", "cosine", "polynomial", "log_linear")

    def alpha(self, timesteps: Tensor) -> Tensor:
        return self.schedule.alpha(timesteps)

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return self.schedule.alpha_rate(timesteps)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return self.schedule.noising_probability(timesteps)

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return self.schedule.timestep_at(noising_probability)

    def mask_noise(self, timesteps: Tensor) -> Tensor:
        return (1 - self.uniform_share) * self.noising_probability(timesteps)

    def mask_noise_rate(self, timesteps: Tensor) -> Tensor:
        return (self.uniform_share - 1) * self.alpha_rate(timesteps)

    def mask_jump_rate(self, timesteps: Tensor) -> Tensor:
        return (self.uniform_share - 1) * self._relative_rate(timesteps)

    def uniform_noise(self, timesteps: Tensor) -> Tensor:
        return self.uniform_share * self.noising_probability(timesteps)

    def uniform_noise_rate(self, timesteps: Tensor) -> Tensor:
        return -self.uniform_share * self.alpha_rate(timesteps)

    def uniform_jump_rate(self, timesteps: Tensor) -> Tensor:
        return -self.uniform_share * self._relative_rate(timesteps)

    def _relative_rate(self, timesteps: Tensor) -> Tensor:
        return self.alpha_rate(timesteps) / self.alpha(timesteps)
