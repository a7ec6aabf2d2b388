"""What this process is doing, and whether it gets on: one record a process, written by the training loop, read by the watchdog's thread
(w1train.runtime.watchdog) and shown in status.json.

A global, as the signals that end up here are: what computes (a micro-batch, a pass of the sampler) says :func:`beat` without having to be
handed anything. Without a watchdog nobody reads it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STARTING, TRAINING, VALIDATING, SAVING, LOADING = "starting", "training", "validating", "saving", "loading"


@dataclass(slots=True)
class Pulse:
    """Of one process."""

    activity: str = STARTING
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    num_steps: int = 0
    total_tokens: int = 0
    progress: float = field(default_factory=time.monotonic)
    """When it last got on."""
    moved: float = field(default_factory=time.monotonic)
    """The time at which a thread of this process last read or wrote a piece of a checkpoint."""
    transfers: list[str] = field(default_factory=list)
    """The files that its threads read or write at this moment, for the message of a hang."""
    stop_requested: bool = False
    """A signal asks for the end, at the next step's boundary."""
    observer: Callable[[], None] | None = None
    """Called at each sign of progress."""

    def beat(self) -> None:
        """A sign of progress."""
        self.progress = time.monotonic()
        if self.observer is not None:
            self.observer()

    def note_movement(self) -> None:
        """A piece of a checkpoint has been read or written. For the main thread it is a sign of progress; a save in the background is one
        for those alone who wait for it (w1train.runtime.transfers), or it would hide a training step that hangs beside it."""
        self.moved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self.beat()

    @contextmanager
    def transferring(self, what: str) -> Iterator[None]:
        """Say what a thread reads or writes, while it does."""
        self.note_movement()
        self.transfers.append(what)
        try:
            yield
        finally:
            self.transfers.remove(what)

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Do something else than before for a while."""
        before, self.activity = self.activity, activity
        self.beat()
        try:
            yield
        finally:
            self.activity = before
            self.beat()


pulse = Pulse()


def beat() -> None:
    """This process gets on."""
    pulse.beat()


def moved() -> None:
    """A piece of a checkpoint has been read or written by this thread."""
    pulse.note_movement()
