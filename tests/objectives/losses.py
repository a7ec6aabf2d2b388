"""The loss of a corrupted batch, from cross-entropies that a test makes up."""

from __future__ import annotations

from typing import Any

import torch

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.corruption import NoisyBatch
from w1train.objectives.loss_rows import loss_rows
from w1train.objectives.named_sums import NamedSums
from w1train.objectives.objective import objective_of

NUM_BINS = 10


def loss(cross_entropy: torch.Tensor, noisy: NoisyBatch, config: DiffusionConfig) -> tuple[torch.Tensor, NamedSums]:
    """(weighted sum, sums) of cross-entropies at ``loss_mask`` and behind them at ``next_mask``."""
    objective = objective_of(config, NUM_BINS)
    return objective.loss({"cross_entropy": cross_entropy}, loss_rows(noisy, objective.weights(noisy)))


def metrics(sums: NamedSums, config: DiffusionConfig) -> dict[str, Any]:
    return objective_of(config, NUM_BINS).metrics(sums)
