"""Masked diffusion with a linear schedule: the mask token replaces a token with probability t (LLaDA, arXiv 2502.09992, eq. 3; MDLM, arXiv
2406.07524, with alpha_t = 1 - t)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from w1train.diffusion.process import NoiseProcess


@dataclass(frozen=True, slots=True)
class MaskedProcess(NoiseProcess):
    """Masked diffusion: all noise is on the mask token, and a token that is not masked is the token of the text."""

    mask_token_id: int
    name: ClassVar[str] = "masked diffusion"

    def alpha(self, timesteps: Tensor) -> Tensor:
        return 1 - timesteps

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return -torch.ones_like(timesteps)

    def noise(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return timesteps * (ids == self.mask_token_id)

    def noise_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return torch.ones_like(timesteps) * (ids == self.mask_token_id)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return noising_probability

    def replacements(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        return tokens.new_full((1, 1), self.mask_token_id)

    def is_noised(self, ids: Tensor) -> Tensor:
        return ids == self.mask_token_id

    def reverse_probabilities(self, ids: Tensor, predictions: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
        """Return the probabilities of NoiseProcess.reverse_probabilities: a mask stays a mask with probability s / t, and otherwise becomes
        a token. Every other token stays, even if the model gives it the probability 0."""
        stay = (earlier / timesteps)[:, None]
        every_id = torch.arange(predictions.shape[1], device=ids.device)
        of_mask = torch.where(every_id == self.mask_token_id, stay, (1 - stay) * predictions)
        return torch.where(self.is_noised(ids)[:, None], of_mask, (ids[:, None] == every_id).to(predictions.dtype))
