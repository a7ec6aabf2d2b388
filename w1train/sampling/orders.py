"""The orders in which a denoising step keeps predictions.

Shapes: b = rows of a batch, n = open positions of the block in the row that has most, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.model.row_terms import LogProbabilities, value_of


@dataclass(frozen=True, slots=True)
class Candidates:
    """The predictions for the open positions of a block. A row with fewer open positions than another is filled up at its end, and no rule
    decides about the fill."""

    logits: Tensor
    """float64 [b, n, v]; -inf at ids that are never chosen."""
    predictions: Tensor
    """int64 [b, n]: the token that each position gets if it is kept."""
    num_open: list[int]
    """Open positions of each row."""
    generators: list[torch.Generator]
    """The random numbers of each row. A rule draws for the open positions of a row alone, so that no row depends on another."""


@dataclass(frozen=True, slots=True)
class Order:
    """A way to score predictions. Those with the highest scores are kept first."""

    scores: Callable[[Candidates], Tensor]
    """The function that gives each prediction a score, float64 [b, n]."""
    are_log_probabilities: bool = False
    """True: a score is the log-probability of its prediction, so that sampling.threshold can be compared with it."""


def low_confidence(candidates: Candidates) -> Tensor:
    """Return the log-probability of each prediction, at temperature 1 (LLaDA, arXiv 2502.09992, algorithm 5)."""
    term = LogProbabilities(candidates.predictions.reshape(-1, 1))
    return value_of(term, candidates.logits.flatten(0, 1)).reshape(candidates.predictions.shape)


def random_order(candidates: Candidates) -> Tensor:
    """Return random numbers (LLaDA, arXiv 2502.09992, algorithm 4)."""
    predictions = candidates.predictions
    scores = torch.zeros(predictions.shape, dtype=torch.float64, device=predictions.device)
    for row, (generator, count) in enumerate(zip(candidates.generators, candidates.num_open, strict=True)):
        scores[row, :count] = torch.rand(count, generator=generator, device=predictions.device, dtype=torch.float64)
    return scores
