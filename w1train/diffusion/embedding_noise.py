"""Gaussian noise on the embeddings of masked tokens (LLaDA2.0's stabilisation of converted models).

Shapes: m = masked tokens of this rank, h = hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.diffusion.philox import Purpose, random_words

_PLACES = 1 << 24
"""More than a sample has positions."""


@dataclass(slots=True)
class EmbeddingNoise:
    """Where noise is added, and what it depends on: the same under every layout."""

    std: float
    seed: int
    rows: Tensor
    """int64 [m]: sample of the micro-batch."""
    columns: Tensor
    """int64 [m]: position among this rank's."""
    sample_indices: Tensor
    """int64 [m]: global index of the sample."""
    places: Tensor
    """int64 [m]: position in the sample."""

    def add_to(self, embedded: Tensor, first_column: int | None = None) -> Tensor:
        """The embeddings [s, b, h] of positions ``first_column`` and on, with the noise; None = of all positions. Then none has to be
        picked out, for whose number the host would wait until the GPU is done with all that is queued."""
        if first_column is None:
            noise = self._draw(self.sample_indices, self.places, embedded.shape[2]).to(embedded.dtype)
            return embedded.index_put((self.columns, self.rows), noise, accumulate=True)
        here = (self.columns >= first_column) & (self.columns < first_column + len(embedded))
        noise = self._draw(self.sample_indices[here], self.places[here], embedded.shape[2]).to(embedded.dtype)
        return embedded.index_put((self.columns[here] - first_column, self.rows[here]), noise, accumulate=True)

    def _draw(self, sample_indices: Tensor, places: Tensor, size: int) -> Tensor:
        """float64 [m, h], normal by inversion, as initial weights are."""
        indices = sample_indices * _PLACES + places
        if not len(indices):
            return torch.zeros((0, size), dtype=torch.float64, device=indices.device)
        words = random_words(self.seed, indices, draw=0, purpose=Purpose.EMBEDDING, num=size)
        return torch.erfinv(2 * ((words.double() + 0.5) / 2**32) - 1) * (math.sqrt(2) * self.std)
