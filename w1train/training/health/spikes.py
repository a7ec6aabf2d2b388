"""Loss spikes: a step far above what the last ones were.

As OLMo-core's SkipStepOptimizer does (6 standard deviations over 128 steps), a step is compared with those before it. Here with their
median, so that the fall of the loss, and a spike that was let in, do not move the level; the deviation is the larger of the standard one
and the scaled median one (a narrow middle with long tails is no reason to call the tails spikes). Of the gradient norm the logarithm is
compared: weights of 1/t give the norm itself tails that no sigma describes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from w1train.checkpoints.guard_state import is_watchable

_MEDIAN_DEVIATION_TO_SIGMA = 1.4826  # of a normal distribution
_SMALLEST_SIGMA = {"masked_cross_entropy": 0.03, "grad_norm": 0.35}
"""Of the median, and of a logarithm: what hurts a run is far larger than a batch of odd text, however equal the others were."""


class SpikeWindow:
    """The accepted values of the last steps of one stage. Its state is plain lists in a dict, which a checkpoint keeps."""

    def __init__(self, state: dict[str, Any], size: int, sigmas: Mapping[str, float | None]) -> None:
        """
        Args:
            state: of an earlier process, or empty; changed in place.
            size: steps.
            sigmas: for masked_cross_entropy and grad_norm; None = never a spike.
        """
        self._state, self._size, self._sigmas = state, size, sigmas

    def spike(self, values: Mapping[str, float], stage: str) -> str | None:
        """What is a spike about a step that is about to be taken, in words; None = nothing."""
        if self._state.get("stage") != stage:
            return None
        for name, sigma in self._sigmas.items():
            window = self._state[name]
            if sigma is None or 2 * len(window) < self._size:
                continue
            value, limit = values[name], _limit(name, window, sigma)
            if value > limit:
                return f"{name} is {value:.4g}, above {limit:.4g}: {sigma:g} sigma over the last {len(window)} steps"
        return None

    def add(self, values: Mapping[str, float], stage: str) -> None:
        """A step was taken."""
        if self._state.get("stage") != stage:
            self._state.clear()
            self._state.update({"stage": stage, **{name: [] for name in self._sigmas}})
        for name in self._sigmas:
            if is_watchable(values[name]):
                self._state[name] = [*self._state[name], values[name]][-self._size :]

    def clear(self) -> None:
        """Begin anew: the level is another one."""
        self._state.clear()


def _limit(name: str, window: list[float], sigma: float) -> float:
    """Above it a value is a spike."""
    if name == "grad_norm":
        logarithms = [math.log(max(value, 1e-30)) for value in window]
        middle, deviation = _middle_and_deviation(logarithms)
        # Not beyond what a float holds.
        return math.exp(min(700.0, middle + sigma * max(deviation, _SMALLEST_SIGMA[name])))
    middle, deviation = _middle_and_deviation(window)
    return middle + sigma * max(deviation, _SMALLEST_SIGMA[name] * abs(middle))


def _middle_and_deviation(values: list[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    median_deviation = statistics.median([abs(value - middle) for value in values])
    # statistics.pstdev computes in fractions: a millisecond a step.
    mean = math.fsum(values) / len(values)
    standard_deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return middle, max(_MEDIAN_DEVIATION_TO_SIGMA * median_deviation, standard_deviation)
