"""The base class of processes whose noise is partly on the mask token and partly uniform over the other ids."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from w1train.diffusion.noise_ids import NoiseIds
from w1train.diffusion.process import Bound, NoiseProcess
from w1train.diffusion.schedules import log_snr_quadrature
from w1train.diffusion.timesteps import word_thresholds


@dataclass(frozen=True, slots=True)
class MixtureProcess(NoiseProcess):
    """Noise on the mask token and on K other ids. A subclass gives alpha, and the probability and the jump rate of both kinds."""

    mask_token_id: int
    num_noise_ids: int
    words_per_token: ClassVar[int] = 2
    predicts_every_token: ClassVar[bool] = True
    bound: ClassVar[Bound] = "kl_is"
    needs_noise_ids: ClassVar[bool] = True
    masks_are_noise: ClassVar[bool] = True

    @abstractmethod
    def mask_noise(self, timesteps: Tensor) -> Tensor:
        """Return c_t of the mask token, in the shape of ``timesteps``."""

    @abstractmethod
    def mask_noise_rate(self, timesteps: Tensor) -> Tensor:
        """Return the derivative of ``mask_noise`` with respect to t."""

    @abstractmethod
    def uniform_noise(self, timesteps: Tensor) -> Tensor:
        """Return the probability that noise puts on all other ids together."""

    @abstractmethod
    def uniform_noise_rate(self, timesteps: Tensor) -> Tensor:
        """Return the derivative of ``uniform_noise`` with respect to t."""

    @abstractmethod
    def mask_jump_rate(self, timesteps: Tensor) -> Tensor:
        """Return r_t of the mask token, without the rounding of the difference of NoiseProcess.jump_rate."""

    @abstractmethod
    def uniform_jump_rate(self, timesteps: Tensor) -> Tensor:
        """Return r_t of all other ids together, as for ``mask_jump_rate``."""

    @property
    def ids(self) -> NoiseIds:
        """The ids of the uniform part."""
        return NoiseIds(self.num_noise_ids, self.mask_token_id)

    def word_noise(self, timesteps: Tensor) -> Tensor:
        return self.uniform_noise(timesteps) / self.ids.count

    def noise(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self._at_ids(self.mask_noise(timesteps), self.uniform_noise(timesteps), ids)

    def noise_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self._at_ids(self.mask_noise_rate(timesteps), self.uniform_noise_rate(timesteps), ids)

    def jump_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self._at_ids(self.mask_jump_rate(timesteps), self.uniform_jump_rate(timesteps), ids)

    def quadrature(self, fractions: Tensor) -> tuple[Tensor, Tensor]:
        return log_snr_quadrature(fractions)

    def replacements(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """Return an ordinary id where the first word is below the uniform part of the noising probability, and the mask token elsewhere."""
        is_uniform = words[:, 0] < word_thresholds(self.uniform_noise(timesteps))
        return torch.where(is_uniform, self.ids.draw(words[:, 1]), self.mask_token_id)

    def is_noised(self, ids: Tensor) -> Tensor:
        """Return True everywhere, because any token may be noise."""
        return torch.ones_like(ids, dtype=torch.bool)

    def _at_ids(self, of_mask: Tensor, of_others: Tensor, ids: Tensor) -> Tensor:
        """Return values at ids: ``of_mask`` at the mask token, and an equal part of ``of_others`` at each id of the uniform part."""
        return of_mask * (ids == self.mask_token_id) + of_others / self.ids.count * self.ids.contains(ids)
