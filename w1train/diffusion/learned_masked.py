"""Masked diffusion with a learned rate for each token (GenMD4, arXiv 2406.04329, section 6): token v is masked with the probability
(1 - EPSILON) t^w_v at t.

Shapes: b = samples, l = sequence_length, n = positions, v = vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from w1train.diffusion.masked import MaskedProcess
from w1train.diffusion.timesteps import word_thresholds

EPSILON = 1e-4
"""The probability with which noise keeps each token at t = 1. If it were 0, log q of a kept token would be infinite there."""


@dataclass(frozen=True, slots=True)
class LearnedMaskedProcess(MaskedProcess):
    """Masked diffusion with the rates w of the model.

    The corruption and the sampler get the rates by ``with_rates``. What does not depend on the token (alpha, the noising probability and
    the t of a sampler) is that of the rate 1, with which training starts.
    """

    rates: Tensor | None = None
    """float64 [v]."""
    name: ClassVar[str] = "masked diffusion with learned rates"
    bound: ClassVar = "per_id"
    learns_rates: ClassVar[bool] = True
    has_complements: ClassVar[bool] = False
    schedules: ClassVar[tuple[str, ...]] = ("linear",)

    def with_rates(self, rates: Tensor) -> Self:
        return dataclasses.replace(self, rates=rates.double())

    def alpha(self, timesteps: Tensor) -> Tensor:
        return 1 - self.noising_probability(timesteps)

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return torch.full_like(timesteps, EPSILON - 1)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return (1 - EPSILON) * timesteps

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return (noising_probability / (1 - EPSILON)).clamp_max(1)

    def elbo_weight(self, timesteps: Tensor) -> Tensor:
        """Return 1/t, which every rate is multiplied by."""
        return 1 / timesteps

    def noised_tokens(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        assert self.rates is not None, "with_rates gives the process the rates of the model"
        return words < word_thresholds((1 - EPSILON) * timesteps ** self.rates[tokens])

    def reverse_probabilities(self, ids: Tensor, predictions: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
        """Return the probabilities of NoiseProcess.reverse_probabilities: a mask becomes the token v with the probability of v times
        1 - (s / t)^w_v, and otherwise stays a mask."""
        assert self.rates is not None, "with_rates gives the process the rates of the model"
        stay = (earlier / timesteps)[:, None] ** self.rates
        every_id = torch.arange(predictions.shape[1], device=ids.device)
        of_mask = torch.where(every_id == self.mask_token_id, (stay * predictions).sum(dim=1, keepdim=True), (1 - stay) * predictions)
        return torch.where(self.is_noised(ids)[:, None], of_mask, (ids[:, None] == every_id).to(of_mask.dtype))


def rates_at(rates: Tensor, timesteps: Tensor) -> Tensor:
    """Return w / t, the rates of change of the log-probabilities of being masked, in the broadcast shape of both arguments."""
    return rates / timesteps


def log_probability(rates: Tensor, timesteps: Tensor, is_masked: Tensor) -> Tensor:
    """Return log q_t(z | x) of tokens, and its gradient for the rates.

    Args:
        rates: w of each token.
        timesteps: t of each token, above 0.
        is_masked: whether z is the mask token.
    """
    log_masked = math.log1p(-EPSILON) + rates * timesteps.log()
    return torch.where(is_masked, log_masked, torch.log(-torch.expm1(log_masked)))


def reconstruction(rates: Tensor, tokens: Tensor, smallest_timestep: float, mask_token_id: int) -> Tensor:
    """Return the mean of -log p(x | z) of tokens at the smallest t, in nats, in the shape of ``tokens``: the end term of the bound. A token
    that is still masked there is guessed with a probability in proportion to t^w_v (arXiv 2406.04329, section 6).

    Args:
        rates: [v].
        tokens: int64.
    """
    log_masked = rates * math.log(smallest_timestep)
    is_mask = torch.arange(len(rates), device=rates.device) == mask_token_id
    total = torch.logsumexp(log_masked.masked_fill(is_mask, -torch.inf), dim=0)
    return ((1 - EPSILON) * log_masked.exp() * (total - log_masked))[tokens]
