"""The autoregressive loss of the clean stream, beside a diffusion loss (Nemotron, I-DLM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from w1train.model.row_terms import CrossEntropy, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The sum of weight * -log p(next token) over the clean stream. With weight 0 no batch has rows for this term."""

    weight: float

    is_measured: ClassVar[bool] = False

    @property
    def layout(self) -> Layout:
        return {"next_cross_entropy": (), "num_next": ()}

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        return {"cross_entropy": CrossEntropy(rows.targets)}

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor | None:
        return self.weight * rows.of_clean_stream(values["cross_entropy"]).sum() if self.weight > 0 else None

    def sums(self, values: Mapping[str, Tensor], rows: LossRows) -> dict[str, Tensor]:
        cross_entropy = rows.of_clean_stream(values["cross_entropy"]).double()
        return {"next_cross_entropy": cross_entropy.sum(), "num_next": cross_entropy.new_full((), len(cross_entropy))}

    def total(self, sums: Mapping[str, Any]) -> float:
        return self.weight * sums["next_cross_entropy"]

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        return {"autoregressive_loss": sums["next_cross_entropy"] / max(sums["num_next"], 1.0)} if self.weight > 0 else {}
