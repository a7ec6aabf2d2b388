"""The number of units of text that a loss is a mean over: samples, documents or positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from w1train.model.row_terms import RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout


@dataclass(frozen=True, slots=True)
class UnitCount:
    """A term that adds nothing to the loss, and counts the units that diffusion.normalizer names."""

    is_measured: ClassVar[bool] = False

    @property
    def layout(self) -> Layout:
        return {"num_units": ()}

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        return {}

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor | None:
        return None

    def sums(self, values: Mapping[str, Tensor], rows: LossRows) -> dict[str, Tensor]:
        assert rows.num_units is not None
        return {"num_units": rows.num_units}

    def total(self, sums: Mapping[str, Any]) -> float:
        return 0.0

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        return {}
