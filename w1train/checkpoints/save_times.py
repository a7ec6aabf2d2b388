"""The cost of saves: how long training waited, how long the background took, and how much slower steps were during a save."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NUM_STEPS = 50
"""The number of latest steps without a save that steps during a save are compared with."""


class SaveTimes:
    """The ``checkpoint/`` metrics of training records. Each number is in one record: the record of the first step that ends after the
    number is known."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._known: dict[str, float] = {}
        self._depth = 0
        self._alone: deque[float] = deque(maxlen=_NUM_STEPS)
        self._beside: list[float] = []

    @contextmanager
    def stalling(self) -> Iterator[None]:
        """Count the time inside as time in which training waits for a save. Time in nested blocks counts once."""
        started, self._depth = self._clock(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                name = "checkpoint/stall_seconds"
                self._known[name] = self._known.get(name, 0.0) + self._clock() - started

    def step(self, seconds: float, *, is_saving: bool) -> None:
        """Note the seconds that a step took, and whether a save was under way during the step."""
        (self._beside if is_saving else self._alone).append(seconds)

    def saved(self, seconds: float) -> float | None:
        """Note the seconds that a save took in the background. Return by what fraction steps were longer during the save than without a
        save (negative if they were shorter), or None if there are no steps to compare."""
        self._known["checkpoint/background_seconds"] = seconds
        dip = None
        if self._beside and self._alone:
            dip = sum(self._beside) / len(self._beside) / (sum(self._alone) / len(self._alone)) - 1
            self._known["checkpoint/background_dip"] = dip
        self._beside = []
        return dip

    def restarted(self, seconds: float) -> None:
        """Note the seconds from the start of the process to the end of the first step after a resume."""
        self._known["checkpoint/restart_seconds"] = seconds

    def take(self) -> dict[str, float]:
        """Return the metrics that have become known since the last call."""
        known, self._known = self._known, {}
        return known
