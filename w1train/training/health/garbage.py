"""Garbage collections at the same steps on all ranks: by itself, Python collects on each rank at another moment, and with thousands of
ranks one of them makes the others wait at almost every step."""

from __future__ import annotations

import gc


class GarbageCollection:
    """A context manager around training."""

    def __init__(self, interval: int) -> None:
        """``interval``: steps; 0 = Python's own way."""
        self._interval = interval

    def __enter__(self) -> GarbageCollection:
        if self._interval:
            gc.collect()
            # Model, optimizer and modules stay to the end: no collection need look at them again.
            gc.freeze()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        """The process ends soon, and collects what there is as it does: frozen, that would be leaks to the libraries it belongs to. A
        forked process, which does not, has garbage of its parent that no collection here may touch: so none is enabled."""
        if self._interval:
            gc.unfreeze()

    def step_done(self, step: int) -> None:
        """Collect, if it is time."""
        if self._interval and step % self._interval == 0:
            gc.collect()
