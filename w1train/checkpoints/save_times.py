"""What saving costs: how long training stood still, how long files were written beside it, and how much slower steps were meanwhile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NUM_STEPS = 50
"""Steps without a save that those with one are compared with."""


class SaveTimes:
    """The ``checkpoint/`` part of training records: each number once, in the record of the first step that ends after it is known."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._known: dict[str, float] = {}
        self._depth = 0
        self._alone: deque[float] = deque(maxlen=_NUM_STEPS)
        self._beside: list[float] = []

    @contextmanager
    def stalling(self) -> Iterator[None]:
        """Training stands still for a save inside; what is inside another such block counts once."""
        started, self._depth = self._clock(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                name = "checkpoint/stall_seconds"
                self._known[name] = self._known.get(name, 0.0) + self._clock() - started

    def step(self, seconds: float, *, is_saving: bool) -> None:
        """A step took so long; whether a save was being written then."""
        (self._beside if is_saving else self._alone).append(seconds)

    def saved(self, seconds: float) -> float | None:
        """A save was in the background for so long. Returns by what fraction steps were longer meanwhile, if there were any to compare."""
        self._known["checkpoint/background_seconds"] = seconds
        dip = None
        if self._beside and self._alone:
            dip = sum(self._beside) / len(self._beside) / (sum(self._alone) / len(self._alone)) - 1
            self._known["checkpoint/background_dip"] = dip
        self._beside = []
        return dip

    def restarted(self, seconds: float) -> None:
        """From the start of the process to the first step after a resume."""
        self._known["checkpoint/restart_seconds"] = seconds

    def take(self) -> dict[str, float]:
        """What has become known since the last call."""
        known, self._known = self._known, {}
        return known
