"""A noise process that the product does not have: uniform noise over the vocabulary (D3PM, arXiv 2107.03006)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from w1train.diffusion.process import NoiseProcess


@dataclass(frozen=True, slots=True)
class UniformProcess(NoiseProcess):
    """A token is replaced by one that is drawn from the whole vocabulary, with the probability 1 - (1 - t)^2."""

    vocab_size: int
    name: ClassVar[str] = "uniform diffusion"
    words_per_token: ClassVar[int] = 2

    def alpha(self, timesteps: Tensor) -> Tensor:
        return (1 - timesteps) ** 2

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return -2 * (1 - timesteps)

    def noise(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.noising_probability(timesteps) / self.vocab_size * torch.ones_like(ids)

    def noise_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return 2 * (1 - timesteps) / self.vocab_size * torch.ones_like(ids)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return timesteps * (2 - timesteps)

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return 1 - (1 - noising_probability) ** 0.5

    def replacements(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        return (words[:, 1] * self.vocab_size) >> 32

    def is_noised(self, ids: Tensor) -> Tensor:
        return torch.ones_like(ids, dtype=torch.bool)
