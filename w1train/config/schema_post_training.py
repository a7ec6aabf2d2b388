"""The classes of the configuration tree (w1train/config/schema.py) for post-training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from w1train.config.constraints import OptionalPath

ReferenceMode = Literal["live", "adapters_off"]


@dataclass(slots=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that preferences are compared with (diffusion.preference_draws)."""

    mode: ReferenceMode = "live"
    """live: the model is in memory in the same layout, without gradients and without an optimizer, and runs over the same noisy
    text. adapters_off: the model of the run with its adapters off, which takes no memory, and is the model before adapters were trained."""
    weights: OptionalPath = None
    """Path of the reference's weights, as in training.initial_weights; null = training.initial_weights. A run that resumes reads
    them again, and compares them with those that it began with."""
