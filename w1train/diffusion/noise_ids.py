"""The ids that noise can put in the place of a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig


@dataclass(frozen=True, slots=True)
class NoiseIds:
    """The ids below ``bound``, without the mask token if it is excluded. All have the same probability."""

    bound: int
    excluded: int | None = None

    @classmethod
    def of(cls, config: DiffusionConfig) -> NoiseIds:
        """Return the ids of uniform noise: the mask token is one of them only if the model can predict it."""
        return cls(config.num_noise_ids, config.mask_token_id if config.exclude_mask_logit else None)

    @property
    def count(self) -> int:
        return self.bound - (self.excluded is not None and self.excluded < self.bound)

    def contains(self, ids: Tensor) -> Tensor:
        """Return which ids noise can put in the place of a token, bool in the shape of ``ids``."""
        inside = ids < self.bound
        return inside if self.excluded is None else inside & (ids != self.excluded)

    def draw(self, words: Tensor) -> Tensor:
        """Return an id for each random 32-bit word, int64 in the shape of ``words``. Only integers are computed, so every device gets
        the same ids."""
        ids = (words * self.count) >> 32
        return ids if self.excluded is None else ids + (ids >= self.excluded).to(torch.int64)
