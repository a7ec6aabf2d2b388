"""Masked diffusion: the mask token replaces a token with the noising probability of a schedule, which is t in the linear schedule (LLaDA,
arXiv 2502.09992, eq. 3; MDLM, arXiv 2406.07524; MD4, arXiv 2406.04329)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from w1train.diffusion.process import NoiseProcess
from w1train.diffusion.schedules import Linear, Schedule


@dataclass(frozen=True, slots=True)
class MaskedProcess(NoiseProcess):
    """Masked diffusion: all noise is on the mask token, and a token that is not masked is the token of the text."""

    mask_token_id: int
    schedule: Schedule = field(default_factory=Linear)
    name: ClassVar[str] = "masked diffusion"
    schedules: ClassVar[tuple[str, ...]] = ("linear", "cosine", "polynomial", "log_linear", "geometric")

    def alpha(self, timesteps: Tensor) -> Tensor:
        return self.schedule.alpha(timesteps)

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return self.schedule.alpha_rate(timesteps)

    def noise(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.noising_probability(timesteps) * (ids == self.mask_token_id)

    def noise_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return -self.alpha_rate(timesteps) * (ids == self.mask_token_id)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return self.schedule.noising_probability(timesteps)

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return self.schedule.timestep_at(noising_probability)

    def replacements(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        return tokens.new_full((1, 1), self.mask_token_id)

    def is_noised(self, ids: Tensor) -> Tensor:
        return ids == self.mask_token_id

    def bound_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return r / q = -alpha' / (alpha (1 - alpha)) at mask tokens: this is elbo_weight / alpha, and the KL of masked noise is alpha
        times the cross-entropy. A token that is not masked adds nothing to the bound."""
        times = timesteps.double()
        weight = self.elbo_weight(times) / self.alpha(times)
        return torch.where(self.is_noised(inputs), weight, torch.zeros_like(weight))

    def reverse_probabilities(self, ids: Tensor, predictions: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
        """Return the probabilities of NoiseProcess.reverse_probabilities: a mask stays a mask with the ratio of the noising probabilities
        at s and t, and otherwise becomes a token. Every other token stays, even if the model gives it the probability 0."""
        stay = (self.noising_probability(earlier) / self.noising_probability(timesteps))[:, None]
        every_id = torch.arange(predictions.shape[1], device=ids.device)
        of_mask = torch.where(every_id == self.mask_token_id, stay, (1 - stay) * predictions)
        return torch.where(self.is_noised(ids)[:, None], of_mask, (ids[:, None] == every_id).to(predictions.dtype))
