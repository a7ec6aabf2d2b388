"""Segments: stretches of tokens that share a row of the condition table, and sums over them.

Shapes: s = tokens of this rank, b = samples, n = rows (s * b, or m where there is no sample dimension), g = segments,
h = hidden size, p = pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

PIECE_SIZE = 32
"""Rows that one program of a backward kernel adds up, at most."""


@dataclass(slots=True, frozen=True)
class Pieces:
    """Rows sorted by segment and cut into pieces of at most PIECE_SIZE rows, each within one segment.

    A program adds up the rows of a piece in order, and a second kernel adds up the pieces of a segment in order. The sums are therefore
    the same in every run, which atomic additions would not ensure, and programs have equal work however long the segments are.
    """

    order: Tensor
    """int32 [n]: rows in the order of their segments."""
    start: Tensor
    """int32 [p]: first place of each piece in ``order``. Entries after the last piece are empty pieces."""
    end: Tensor
    """int32 [p]: first place after each piece."""
    segment: Tensor
    """int32 [p]: the segment of each piece."""
    first: Tensor
    """int32 [g + 1]: the first piece of each segment."""


@dataclass(slots=True)
class Segments:
    """The row of the condition table for each token of a micro-batch. All layers share it, so that its pieces are cut once."""

    index: Tensor | None
    """int64 [s, b] (or [m]); None = segment i is sample i."""
    _pieces: dict[tuple[int, int], Pieces] = field(default_factory=dict, repr=False)

    def rows(self, table: Tensor) -> Tensor:
        """Return the table's row for each token, [s, b, h], or a view [1, b, h] if each sample is one segment."""
        return table[None] if self.index is None else table[self.index]

    def sum(self, values: Tensor, num_segments: int) -> Tensor:
        """Return the sums of values [s, b, h] over each segment's tokens, [g, h] in fp32 (fp64 if the values are fp64)."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        if self.index is None:
            return values.sum(dim=0, dtype=dtype)
        sums = torch.zeros((num_segments, values.shape[-1]), dtype=dtype, device=values.device)
        return sums.index_add_(0, self.index.flatten(), values.reshape(-1, values.shape[-1]).to(dtype))

    def pieces(self, num_rows: int, num_segments: int, device: torch.device) -> Pieces:
        """Return the pieces, which are cut once for each number of rows and segments, without waiting for the GPU.

        With ``num_segments`` 1 (a norm without modulation) all rows are one segment, whatever ``index`` says. Otherwise rows of other
        segments would be in no piece, and their gradients would never be written.
        """
        key = (num_rows, num_segments)
        if key not in self._pieces:
            if self.index is None or num_segments == 1:
                index = torch.arange(num_rows, device=device) % num_segments
            else:
                index = self.index.flatten()
            self._pieces[key] = cut_pieces(index, num_segments)
        return self._pieces[key]


def cut_pieces(index: Tensor, num_segments: int, size: int = PIECE_SIZE) -> Pieces:
    """Cut rows into pieces of at most ``size`` rows, from the segment of each row, int64 [n] in any order.

    The number of pieces does not depend on the lengths of the segments, which only the GPU knows: at most n / size pieces are full, and
    each segment has at most one piece that is not full.
    """
    ordered, order = index.sort(stable=True)
    borders = torch.searchsorted(ordered, torch.arange(num_segments + 1, device=index.device))
    counts = torch.div(borders.diff() + size - 1, size, rounding_mode="floor")
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    piece = torch.arange(len(index) // size + num_segments, device=index.device)
    segment = (torch.searchsorted(first, piece, right=True) - 1).clamp(max=num_segments - 1)
    last = borders[segment + 1]
    start = torch.minimum(borders[segment] + (piece - first[segment]) * size, last)
    end = torch.minimum(start + size, last)
    return Pieces(*(part.int() for part in (order, start, end, segment, first)))
