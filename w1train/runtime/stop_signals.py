"""SIGTERM and SIGUSR1 ask a run to save and end (schedulers send them some time before they kill).

Python runs a signal's handler between two bytecodes of the main thread: not while that waits in a collective. The interpreter's C code
writes the signal's number to a pipe at once, wherever the main thread is; the watchdog's thread reads it there, and sees to it that the
process ends in time even then.
"""

from __future__ import annotations

import os
import select
import signal
import time
from types import FrameType
from typing import Any

from w1train.runtime.pulse import pulse

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler's signal reaches a rank twice where it is sent to the launcher, which passes it on, and to the rank itself.
_SAME_REQUEST_SECONDS = 5.0


class StopSignals:
    """A context manager for the main thread. A first signal sets ``pulse.stop_requested``."""

    def __init__(self) -> None:
        self.requested_at: float | None = None
        """Monotonic seconds of the first signal."""
        self.name = ""
        """Of the first signal."""
        self.is_urgent = False
        """A later signal asked again."""

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._old_handlers: dict[signal.Signals, Any] = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._owner = os.getpid()
        # Schedulers signal every process of a job. A forked data worker must neither die of it, before the rank has saved, nor write to
        # our pipe; it ends with its parent.
        # Blocked meanwhile: the child has our handlers until it has got rid of them.
        os.register_at_fork(before=self._block, after_in_parent=self._unblock, after_in_child=self._forget)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._read)
        os.close(self._write)
        self._owner = -1

    def wait(self, seconds: float) -> None:
        """For a thread beside the main one: sleep until a signal comes or :meth:`wake` is called, at most so long, and take note of it."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        for number in os.read(self._read, 256) if ready else b"":
            if number in STOP_SIGNALS:
                self._note(signal.Signals(number))

    def wake(self) -> None:
        """End the :meth:`wait` that is under way."""
        os.write(self._write, b"\0")

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.requested_at is None:
            self.requested_at, self.name = now, number.name
            pulse.stop_requested = True
        elif now - self.requested_at > _SAME_REQUEST_SECONDS:
            self.is_urgent = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """At once, where the main thread can: whether it is a second signal is the pipe's to say, for this may come late."""
        pulse.stop_requested = True

    def _block(self) -> None:
        if self._owner == os.getpid():
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def _unblock(self) -> None:
        if self._owner == os.getpid():
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _forget(self) -> None:
        if self._owner == os.getppid():
            signal.set_wakeup_fd(-1)
            for handled in STOP_SIGNALS:
                signal.signal(handled, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
