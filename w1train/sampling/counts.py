"""The rules that decide how many predictions a denoising step keeps.

Shapes: b = rows of a batch, n = open positions of the block in the row that has most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Count(Protocol):
    """A rule that decides how many predictions of a block each step keeps."""

    def planned(self, num_masked: int, num_steps: int, /) -> list[int] | None:
        """Return how many tokens each step of a block decides; None if this is known only when the predictions are there."""

    def kept(self, order: Tensor, num_planned: int | None, /) -> Tensor:
        """Return which predictions a step keeps, bool [b, n], at least one in each row that has an open position.

        Args:
            order: float64 [b, n], the scores; -inf at fill.
            num_planned: the number that ``planned`` returned for this step.
        """


class Schedule:
    """The count that is planned before the block begins: equally many tokens in each step, those with the highest scores."""

    def planned(self, num_masked: int, num_steps: int) -> list[int]:
        """Return the counts of ``transfer_counts``."""
        return transfer_counts(num_masked, num_steps)

    def kept(self, order: Tensor, num_planned: int | None) -> Tensor:
        """Return the planned number of highest scores of each row."""
        assert num_planned is not None
        return highest(order, num_planned)


@dataclass(frozen=True, slots=True)
class Threshold:
    """The count of confidence-threshold decoding (Fast-dLLM, arXiv 2505.22618): each prediction that is more probable than the threshold,
    and always the most probable one. The scores are log-probabilities."""

    threshold: float

    def planned(self, _num_masked: int, _num_steps: int) -> None:
        """Return None: the predictions decide."""

    def kept(self, order: Tensor, _num_planned: int | None) -> Tensor:
        """Return what ``above_threshold`` returns of the probabilities."""
        return above_threshold(order.exp(), self.threshold)


def transfer_counts(num_masked: int, num_steps: int) -> list[int]:
    """Return how many tokens each step decides: equally many, and one more in the first steps for the remainder (LLaDA's generate)."""
    base, remainder = divmod(num_masked, num_steps)
    return [base + (step < remainder) for step in range(num_steps)]


def above_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """Return which confidences [b, n] are above the threshold, bool [b, n]; the highest of a row always counts."""
    return (confidence > threshold) | highest(confidence, 1)


def highest(order: Tensor, num: int) -> Tensor:
    """Return True for the ``num`` highest numbers of each row of [b, n], bool [b, n]. Of equal numbers, the first are chosen."""
    # The sort is stable, because topk may order equal numbers differently on another device or in another batch size.
    places = order.sort(dim=1, descending=True, stable=True).indices[:, :num]
    return torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(1, places, True)
