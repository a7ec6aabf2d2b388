"""Gaussian noise on the embeddings of masked tokens, which stabilises converted models (LLaDA2.0, arXiv 2512.15745, section 7.1).

Shapes: m = masked tokens of this rank, h = hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.diffusion.philox import Purpose, random_words

_PLACES = 1 << 24
"""A bound on the positions of a sample."""


@dataclass(slots=True)
class EmbeddingNoise:
    """The tokens that noise is added to, and the numbers that their noise depends on, which are the same in every layout."""

    std: float
    seed: int
    rows: Tensor
    """int64 [m]: the token's sample, counted inside the micro-batch."""
    columns: Tensor
    """int64 [m]: the token's position, counted among this rank's positions."""
    sample_indices: Tensor
    """int64 [m]: global index of the token's sample."""
    places: Tensor
    """int64 [m]: the token's position in its sample."""

    def add_to(self, embedded: Tensor, first_column: int | None = None) -> Tensor:
        """Return embeddings [s, b, h] with their noise.

        Args:
            embedded: the embeddings of the positions from ``first_column`` on.
            first_column: None if these are all positions of the rank, so that no tokens have to be selected. To learn how many tokens are
                selected, the host would have to wait until the GPU has done all its queued work.
        """
        if first_column is None:
            noise = self._draw(self.sample_indices, self.places, embedded.shape[2]).to(embedded.dtype)
            return embedded.index_put((self.columns, self.rows), noise, accumulate=True)
        here = (self.columns >= first_column) & (self.columns < first_column + len(embedded))
        noise = self._draw(self.sample_indices[here], self.places[here], embedded.shape[2]).to(embedded.dtype)
        return embedded.index_put((self.columns[here] - first_column, self.rows[here]), noise, accumulate=True)

    def _draw(self, sample_indices: Tensor, places: Tensor, size: int) -> Tensor:
        """Return normal numbers, float64 [m, h], from uniform numbers by the inverse of the distribution function, as for initial
        weights."""
        indices = sample_indices * _PLACES + places
        if not len(indices):
            return torch.zeros((0, size), dtype=torch.float64, device=indices.device)
        words = random_words(self.seed, indices, draw=0, purpose=Purpose.EMBEDDING, num=size)
        return torch.erfinv(2 * ((words.double() + 0.5) / 2**32) - 1) * (math.sqrt(2) * self.std)
