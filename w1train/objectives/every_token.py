"""The cross-entropy of every token that can be predicted, also of those that noise has kept, beside another loss (D3PM, arXiv 2107.03006,
eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.diffusion.processes import noise_process
from w1train.model.row_terms import CrossEntropy, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout


def adds_every_token(config: DiffusionConfig) -> bool:
    """Return whether a configuration asks for the term. In autoregression the main term is already this sum."""
    return config.cross_entropy_weight > 0 and not noise_process(config).is_causal


@dataclass(frozen=True, slots=True)
class EveryToken:
    """lambda times the sum of -log p(token) over the rows of the noisy stream, which are then all tokens that can be predicted."""

    weight: float

    is_measured: ClassVar[bool] = False

    @property
    def layout(self) -> Layout:
        return {"cross_entropy_of_every_token": ()}

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        return {"cross_entropy": CrossEntropy(rows.targets)}

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        return self.weight * rows.of_noisy_stream(values["cross_entropy"]).sum()

    def sums(self, values: Mapping[str, Tensor], rows: LossRows) -> dict[str, Tensor]:
        return {"cross_entropy_of_every_token": rows.of_noisy_stream(values["cross_entropy"]).double().sum()}

    def total(self, sums: Mapping[str, Any]) -> float:
        return self.weight * sums["cross_entropy_of_every_token"]

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        return {"cross_entropy_of_every_token": sums["cross_entropy_of_every_token"] / max(sums["num_tokens"], 1.0)}
