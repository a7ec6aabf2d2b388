"""The registration of the revisers, which change a text after its last step, and their use on texts that the sampler has not written.

Shapes: b = rows of a batch, w = tokens of the part of the text that is revised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from w1train.sampling.conditional_modes import ConditionalModes
from w1train.sampling.kernel import Batch
from w1train.sampling.revision import PredictPart, Revision
from w1train.sampling.self_correction import SelfCorrection


class Reviser(Protocol):
    """The reviser of one batch."""

    def revise(self, tokens: Tensor, may_change: Tensor, predict: PredictPart, /) -> Iterator[Revision]:
        """Revise a part of a text.

        Args:
            tokens: int64 [b, w].
            may_change: bool [b, w].
            predict: the model.
        """

    def select_rows(self, rows: list[int], /) -> None:
        """Keep some of the rows; the others have ended."""


REVISERS: dict[str, Callable[[Batch], Reviser]] = {"conditional_modes": ConditionalModes, "self_correction": SelfCorrection}
"""The reviser of each value of sampling.reviser."""
