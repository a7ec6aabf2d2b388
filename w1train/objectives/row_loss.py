"""The interface of a loss: one number for each row of the noisy stream, and the weight with which this number bounds the likelihood.

Shapes: m = rows of the noisy stream, k = rows of the clean stream, as in LossRows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import Config, DiffusionConfig
from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import RowTerm
from w1train.objectives.loss_rows import LossRows

type Prediction = Literal["leave_one_out", "full"]

ELBO_WEIGHTS = ("elbo", "inverse_t")
"""The values of diffusion.weight that make the loss the bound."""


@dataclass(frozen=True, slots=True)
class RowLoss(ABC):
    """A loss of one configuration and its process. The trained loss is the sum of weight * value over the rows."""

    config: DiffusionConfig
    process: NoiseProcess

    positions: ClassVar[Literal["noised", "all"]] = "all"
    """The tokens that loss_positions=auto stands for."""

    @abstractmethod
    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        """Return what the loss asks of the m + k rows of logits, by name."""

    @abstractmethod
    def value(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        """Return the loss of each row, [m].

        Args:
            values: the values of ``row_terms`` by name, [m + k].
        """

    @abstractmethod
    def elbo_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weight w for which the mean over t of w * value is the negative ELBO without its end terms.

        Args:
            timesteps: t, in any shape.
            inputs, targets: int64 in the same shape, the tokens after noise and before it.
        """

    def total(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        """Return the sum over a micro-batch that is differentiated."""
        return (self.value(values, rows) * rows.weights).sum()

    def end_terms(self, rows: LossRows) -> Tensor | float:
        """Return the part of the bound beside the integral over t that is known without the model, summed over the tokens of a
        micro-batch."""
        return 0.0

    @classmethod
    def taught(cls, config: Config) -> Prediction | None:
        """Return what the model's distribution is given where the loss is smallest (processes that put ordinary tokens in the places of
        others make a difference); None = either."""
        return "leave_one_out"

    @classmethod
    def problems(cls, config: Config, process: NoiseProcess) -> Iterator[Problem]:
        """Yield what in a configuration with this loss the loss cannot serve."""
        yield from ()


def for_all_rows(rows: LossRows, values: Tensor, fill: float | Tensor) -> Tensor:
    """Return values [m] of the noisy stream for all rows, [m + k]. Those of the clean stream, of which a loss of the noisy stream computes
    numbers that nobody reads, are ``fill``: a number, or [k]."""
    num_clean = len(rows.targets) - len(values)
    if num_clean == 0:
        return values
    filled = fill if isinstance(fill, Tensor) else values.new_full((num_clean,), fill)
    return torch.cat([values, filled])


def timesteps_and_inputs(rows: LossRows) -> tuple[Tensor, Tensor]:
    """Return t in float64 and the noised tokens of all rows, [m + k]. A row of the clean stream is its own token at t = 1/2."""
    inputs = for_all_rows(rows, rows.inputs, rows.of_clean_stream(rows.targets))
    return for_all_rows(rows, rows.timesteps.double(), 0.5), inputs
