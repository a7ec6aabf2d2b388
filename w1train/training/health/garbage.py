"""Garbage collections at the same steps on all ranks. Python would collect at a different moment on each rank. With thousands of ranks,
some rank would then make the others wait at almost every step."""

from __future__ import annotations

import gc


class GarbageCollection:
    """A context manager around training that collects at chosen steps."""

    def __init__(self, interval: int) -> None:
        """
        Args:
            interval: steps between collections; 0 = Python collects when it wants.
        """
        self._interval = interval

    def __enter__(self) -> GarbageCollection:
        if self._interval:
            gc.collect()
            # Model, optimizer and modules live until the end. They are frozen, so that collections do not look at them again.
            gc.freeze()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        """Unfreeze, for the end of the process: libraries would take objects that are frozen for leaks.

        Collections stay disabled: in a forked process they would collect garbage that belongs to its parent.
        """
        if self._interval:
            gc.unfreeze()

    def step_done(self, step: int) -> None:
        """Collect, if a collection is due after this step."""
        if self._interval and step % self._interval == 0:
            gc.collect()
