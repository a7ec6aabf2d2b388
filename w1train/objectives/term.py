"""The interface of one term of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from w1train.objectives.loss_rows import LossRows
from w1train.objectives.named_sums import Layout


class Term(Protocol):
    """A term: what it adds to the loss, the sums that it logs, and the metrics that it makes of them.

    Shapes: m = rows of the noisy stream, k = rows of the clean stream, as in LossRows.
    """

    @property
    def layout(self) -> Layout:
        """Names and shapes of the term's sums."""

    def loss(self, cross_entropy: Tensor, rows: LossRows) -> Tensor | None:
        """Return the weighted sum over a micro-batch, to be differentiated and not yet divided; None if the term has no rows.

        Args:
            cross_entropy: float32 [m + k], nats.
        """

    def sums(self, cross_entropy: Tensor, rows: LossRows) -> dict[str, Tensor]:
        """Return the sums of a micro-batch, in the shapes of ``layout``. No gradients are taken of them, and nothing may ask a GPU for a
        value: the host would wait for the forward pass before it launches the backward pass.

        Args:
            cross_entropy: float32 [m + k], nats, detached.
        """

    def total(self, sums: Mapping[str, Any]) -> float:
        """Return what the sums over the global batch say that the term adds to the loss, not yet divided."""

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics of the global batch by the names that they have in records."""
