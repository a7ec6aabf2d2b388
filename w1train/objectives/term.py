"""The interface of one term of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from w1train.model.row_terms import RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout


class Term(Protocol):
    """A term of an objective: what it asks of the rows of logits, the part that it adds to the loss, the sums that it logs, and the metrics
    that it computes from them.

    Shapes: m = rows of the noisy stream, k = rows of the clean stream, as in LossRows.
    """

    @property
    def layout(self) -> Layout:
        """Names and shapes of the term's sums."""

    @property
    def is_measured(self) -> bool:
        """Tell whether the loss needs sums over the global batch that only the model's outputs give. A pass without gradients then computes
        the sums of ``layout`` first, and the term finds those of the whole global batch in ``LossRows.measured``."""

    def row_terms(self, rows: LossRows) -> Mapping[str, RowTerm]:
        """Return what the term asks of the m + k rows of logits, by name. Terms of an objective that use the same name must ask for the
        same row term, which is computed once."""

    def loss(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor | None:
        """Return the weighted sum over a micro-batch, which is not divided yet and will be differentiated; None if the term has no rows.

        Args:
            values: the values of the objective's row terms by name, float32 [m + k] or [m + k, number of ids].
        """

    def sums(self, values: Mapping[str, Tensor], rows: LossRows) -> dict[str, Tensor]:
        """Return the sums of a micro-batch, in the shapes of ``layout``. They have no gradients. Nothing here may ask a GPU for a value,
        because the host would then wait for the forward pass before it launches the backward pass.

        Args:
            values: as in ``loss``, detached.
        """

    def total(self, sums: Mapping[str, Any]) -> float:
        """Return the part that the term adds to the loss, from the sums over the global batch. It is not divided yet."""

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics of the global batch by the names that they have in records."""
