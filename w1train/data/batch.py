"""A micro-batch of packed samples.

Shapes: b = samples of the micro-batch, l = sequence_length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(slots=True)
class PackedBatch:
    """Packed samples, clean: what the data path hands to the diffusion process."""

    tokens: Tensor
    """int64 [b, l]; anything on padding."""
    document_ids: Tensor
    """int32 [b, l]: ordinal of the document inside its sample, ascending from 0; -1 on padding, which is behind the last document and,
    with data.align, between documents."""
    positions: Tensor
    """int32 [b, l]: position inside the document (restarts at 0 with each); 0 on padding."""
    sample_indices: Tensor
    """int64 [b]: index of the sample in the run's global order; never repeats, not even over epochs."""
    may_be_noised: Tensor = None
    """bool [b, l]: tokens that the objective may noise and predict. The others are visible as themselves. By default every token of a
    document may be noised."""

    def __post_init__(self) -> None:
        if self.may_be_noised is None:
            self.may_be_noised = self.document_ids >= 0

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The batch with each of its tensors changed."""
        return PackedBatch(*(change(getattr(self, entry.name)) for entry in fields(self)))
