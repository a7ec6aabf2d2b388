"""Autoregression as a noise process: the text stays clean, and every token is predicted from the tokens before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.process import Corruption, NoiseDraw, NoiseProcess, has_predecessor


@dataclass(frozen=True, slots=True)
class AutoregressiveProcess(NoiseProcess):
    """Noise that replaces no token."""

    name: ClassVar[str] = "autoregressive"
    is_causal: ClassVar[bool] = True

    def alpha(self, timesteps: Tensor) -> Tensor:
        return torch.ones_like(timesteps)

    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        return torch.zeros_like(timesteps)

    def noise(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return torch.zeros_like(timesteps * ids)

    def noise_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        return torch.zeros_like(timesteps * ids)

    def noising_probability(self, timesteps: Tensor) -> Tensor:
        return torch.zeros_like(timesteps)

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        return torch.zeros_like(noising_probability)

    def replacements(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        return tokens

    def is_noised(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids, dtype=torch.bool)

    def elbo_weight(self, timesteps: Tensor) -> Tensor:
        """Return 1 for every token: the chain rule gives the likelihood itself."""
        return torch.ones_like(timesteps)

    def corrupt(self, batch: PackedBatch, config: DiffusionConfig, draw: NoiseDraw) -> Corruption:
        """Leave the text as it is, and give a loss to every token that has a token of its document before it. The model gets t = 0, and
        each sample is one segment. For the loss t is 1, as in the last step of a reverse process that reveals one token at a time."""
        # The probability of the mask token is zero, so a mask token in the data can be no target.
        predicted = batch.may_be_noised & has_predecessor(batch.document_ids) & (batch.tokens != config.mask_token_id)
        return Corruption(
            input_ids=batch.tokens,
            noised=predicted,
            predicted=predicted,
            predictable=predicted,
            timesteps=torch.ones(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device),
            segments=torch.zeros_like(batch.tokens),
            segment_timesteps=torch.zeros((len(batch.tokens), 1), dtype=torch.float64, device=batch.tokens.device),
            shift=True,
        )
