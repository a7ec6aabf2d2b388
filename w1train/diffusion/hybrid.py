"""The hybrid noise of GIDD (arXiv 2503.04482, section 3.2): masks, and in the middle of the process also other tokens.

With c = B t^(gamma/2) (1 - t)^(gamma/2), B = 2^gamma p_u / (1 - p_u) and C = 1 + c:

    alpha = (1 - t) / C,    c_t(mask) = t / C,    sum of c_t over all other ids = c / C,

which is p_u at t = 1/2. At t = 1 all noise is on the mask token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from w1train.diffusion.mixture import MixtureProcess


@dataclass(frozen=True, slots=True)
class HybridProcess(MixtureProcess):
    """GIDD's hybrid noise."""

    uniform_share: float
    """p_u, below 1."""
    gamma: float
    name: ClassVar[str] = "hybrid diffusion"
    mass_field: ClassVar[str] = "hybrid_gamma"
    mass_remedy: ClassVar[str | None] = "diffusion.hybrid_gamma=1 (GIDD); at most 2"

    def _uniform_odds(self, timesteps: Tensor) -> Tensor:
        """Return c, in the shape of ``timesteps``."""
        scale = 2**self.gamma * self.uniform_share / (1 - self.uniform_share)
        return scale * (timesteps * (1 - timesteps)) ** (self.gamma / 2)

    def _uniform_odds_rate(self, timesteps: Tensor) -> Tensor:
        return self._uniform_odds(timesteps) * self.gamma / 2 * (1 - 2 * timesteps) / (timesteps * (1 - timesteps))

    def alpha(self, timesteps: Tensor) -> Tensor:
        return (1 - timesteps) / (1 + self._uniform_odds(timesteps))

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        total = 1 + self._uniform_odds(timesteps)
        return -(total + (1 - timesteps) * self._uniform_odds_rate(timesteps)) / total**2

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        odds = self._uniform_odds(timesteps)
        return (timesteps + odds) / (1 + odds)

    def mask_noise(self, timesteps: Tensor) -> Tensor:
        return timesteps / (1 + self._uniform_odds(timesteps))

    def mask_noise_rate(self, timesteps: Tensor) -> Tensor:
        total = 1 + self._uniform_odds(timesteps)
        return (total - timesteps * self._uniform_odds_rate(timesteps)) / total**2

    def mask_jump_rate(self, timesteps: Tensor) -> Tensor:
        return 1 / ((1 - timesteps) * (1 + self._uniform_odds(timesteps)))

    def uniform_noise(self, timesteps: Tensor) -> Tensor:
        odds = self._uniform_odds(timesteps)
        return odds / (1 + odds)

    def uniform_noise_rate(self, timesteps: Tensor) -> Tensor:
        return self._uniform_odds_rate(timesteps) / (1 + self._uniform_odds(timesteps)) ** 2

    def uniform_jump_rate(self, timesteps: Tensor) -> Tensor:
        growth = self.gamma / (2 * timesteps) + (1 - self.gamma / 2) / (1 - timesteps)
        return self.uniform_noise(timesteps) * growth
