"""A micro-batch of packed samples.

Shapes: b = samples of the micro-batch, l = sequence_length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class PackedBatch:
    """Packed samples, clean: what the data path hands to the diffusion process."""

    tokens: Tensor
    """int64 [b, l]; anything on padding."""
    document_ids: Tensor
    """int32 [b, l]: ordinal of the document inside its sample, nondecreasing from 0; -1 on padding (a suffix)."""
    positions: Tensor
    """int32 [b, l]: position inside the document (restarts at 0 with each); 0 on padding."""
    sample_indices: Tensor
    """int64 [b]: index of the sample in the run's global order; never repeats, not even over epochs."""
