"""The check that values of a run are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

from w1train.runtime.distributed import agreed


def require_finite(step: int, values: Mapping[str, float]) -> None:
    """Raise an error if a value is NaN or infinite. The parameters are lost then, but the last checkpoint is still good.

    Args:
        values: the values by their names in the message; they are the same on all ranks.

    Raises:
        FloatingPointError: on every rank.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            error = FloatingPointError(
                f"{name} is {value} at step {step}; training stops before this reaches a checkpoint. "
                "The same command resumes from the last checkpoint, if there is one. A lower learning rate or more clipping needs a run of "
                "another name, which may start from the weights of this run (training.initial_weights)"
            )
            raise agreed(error)
