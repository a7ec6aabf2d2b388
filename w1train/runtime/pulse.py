"""The activity and progress of this process: a single record, which the training loop writes and the watchdog's thread
(w1train.runtime.watchdog) reads, and which status.json shows.

The record is a global of the process, as signals are. Code that computes something (a micro-batch, a pass of the sampler) calls
:func:`beat`, and needs no object for it. Without a watchdog nobody reads the record.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

STARTING, TRAINING, VALIDATING, SAVING, LOADING = "starting", "training", "validating", "saving", "loading"


@dataclass(slots=True)
class Pulse:
    """The record of one process."""

    activity: str = STARTING
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    num_steps: int = 0
    total_tokens: int = 0
    progress: float = field(default_factory=time.monotonic)
    """Monotonic seconds of the last sign of progress."""
    moved: float = field(default_factory=time.monotonic)
    """Monotonic seconds at which a thread of this process last read or wrote a piece of a checkpoint."""
    transfers: list[str] = field(default_factory=list)
    """The files that threads of this process read or write now, for the message of a hang."""
    stop_signal: int = 0
    """The number of the signal that asks the run to end after the current step; 0 = no signal has come."""
    can_stop: bool = False
    """This flag tells whether the run looks for ``stop_signal`` between its steps. During the start it does not."""
    observer: Callable[[], None] | None = None
    """A function that is called at each sign of progress."""

    def reset(self) -> None:
        """Forget an earlier run of this process."""
        fresh = Pulse()
        for each in fields(self):
            setattr(self, each.name, getattr(fresh, each.name))

    def beat(self) -> None:
        """Record a sign of progress."""
        self.progress = time.monotonic()
        if self.observer is not None:
            self.observer()

    def note_movement(self) -> None:
        """Record that a piece of a checkpoint has been read or written. In the main thread this is a sign of progress. In another thread,
        which saves in the background, it counts as progress only for ranks that wait for the save (w1train.runtime.transfers): otherwise
        the save would hide a training step that hangs."""
        self.moved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self.beat()

    @contextmanager
    def transferring(self, what: str) -> Iterator[None]:
        """Name what a thread reads or writes inside the block."""
        self.note_movement()
        self.transfers.append(what)
        try:
            yield
        finally:
            self.transfers.remove(what)

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Set the activity inside the block."""
        before, self.activity = self.activity, activity
        self.beat()
        try:
            yield
        finally:
            self.activity = before
            self.beat()


pulse = Pulse()


def beat() -> None:
    """Record a sign of progress of this process."""
    pulse.beat()


def moved() -> None:
    """Record that this thread has read or written a piece of a checkpoint."""
    pulse.note_movement()
