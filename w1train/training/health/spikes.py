"""Loss spikes: steps whose loss or gradient norm is far above those of the steps before.

OLMo-core's SkipStepOptimizer also compares a step with those before it (6 standard deviations over 128 steps). Here a step is compared with
their median, so that neither the fall of the loss nor a spike that was accepted moves the level. The deviation is the larger of two
numbers, the standard deviation and the scaled median deviation. Values in long tails around a narrow middle are therefore not spikes. The
logarithm of the gradient norm is compared, because weights of 1/t give the norm itself tails that no number of standard deviations
describes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from w1train.checkpoints.guard_state import is_watchable

_MEDIAN_DEVIATION_TO_SIGMA = 1.4826
"""Standard deviation over median deviation of a normal distribution."""
_SMALLEST_SIGMA = {"masked_cross_entropy": 0.03, "grad_norm": 0.35}
"""The smallest deviation that is used, as a share of the median, and of the logarithm. Spikes that harm a run are far larger than the
difference that a batch of unusual text makes, however equal the batches before it were."""


class SpikeWindow:
    """The values of the last accepted steps of one stage. Its state is plain lists in a dictionary, which a checkpoint keeps."""

    def __init__(self, state: dict[str, Any], size: int, sigmas: Mapping[str, float | None]) -> None:
        """
        Args:
            state: the state of an earlier process, or an empty dictionary. It is changed in place.
            size: the number of steps.
            sigmas: the numbers of deviations above which masked_cross_entropy and grad_norm are a spike; None = a value is never a spike.
        """
        self._state, self._size, self._sigmas = state, size, sigmas

    def spike(self, values: Mapping[str, float], stage: str) -> str | None:
        """Describe the spike of a step that is about to be taken; None if it is no spike."""
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
        """Add the values of a step that was taken."""
        if self._state.get("stage") != stage:
            self._state.clear()
            self._state.update({"stage": stage, **{name: [] for name in self._sigmas}})
        for name in self._sigmas:
            if is_watchable(values[name]):
                self._state[name] = [*self._state[name], values[name]][-self._size :]

    def clear(self) -> None:
        """Forget all values, because the level has changed."""
        self._state.clear()


def _limit(name: str, window: list[float], sigma: float) -> float:
    """Return the largest value that is no spike."""
    if name == "grad_norm":
        logarithms = [math.log(max(value, 1e-30)) for value in window]
        middle, deviation = _middle_and_deviation(logarithms)
        # exp overflows a float above 709.
        return math.exp(min(700.0, middle + sigma * max(deviation, _SMALLEST_SIGMA[name])))
    middle, deviation = _middle_and_deviation(window)
    return middle + sigma * max(deviation, _SMALLEST_SIGMA[name] * abs(middle))


def _middle_and_deviation(values: list[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    median_deviation = statistics.median([abs(value - middle) for value in values])
    # statistics.pstdev would take a millisecond in each step, because it computes with fractions.
    mean = math.fsum(values) / len(values)
    standard_deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return middle, max(_MEDIAN_DEVIATION_TO_SIGMA * median_deviation, standard_deviation)
