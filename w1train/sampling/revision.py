"""The parts that revisers share: the model as a function of the part of a text that is revised, and the state of this part after a pass.

Shapes: b = rows of a batch, w = tokens of the part of the text that is revised, v = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from w1train.diffusion.process import NoiseProcess

logger = logging.getLogger(__name__)

PredictPart = Callable[[Tensor, Tensor], Tensor]
"""A model, as a function of the part's tokens, int64 [b, w], and t, float32 [b], that returns the logits of the distribution of each token
given all other tokens, [b, w, v]."""


@dataclass(frozen=True, slots=True)
class Revision:
    """The state of a part of a text after a pass of the model."""

    tokens: Tensor
    """int64 [b, w]."""
    needed: Tensor
    """bool [b]: rows that needed the pass."""
    t: float
    """The t that the model got."""


def warn_of_masked_noise(process: NoiseProcess) -> None:
    """Warn that a model of masked diffusion has not learned to find wrong tokens."""
    if process.bound != "kl_is":
        _say_that_the_noise_is_masks(process.name)


@cache
def _say_that_the_noise_is_masks(name: str) -> None:
    logger.warning(
        "the model was trained with %s, which never puts a wrong token in the text: expect no improvement by a revision of the text", name
    )
