"""SIGTERM and SIGUSR1, which ask a run to save and end (schedulers send them some time before they kill), and SIGINT, by which a person
asks for the same with Ctrl-C.

Python runs a signal's handler between two bytecodes of the main thread, and therefore not while the main thread waits in a collective. The
interpreter's C code writes the signal's number to a pipe at once, wherever the main thread is. The watchdog's thread reads the pipe, and
ends the process in time even if the main thread waits.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from types import FrameType
from typing import Any

from w1train.runtime.pulse import pulse

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A scheduler's signal reaches a rank twice where it is sent to the launcher, which passes it on, and to the rank itself.
_SAME_REQUEST_SECONDS = 5.0
# Ctrl-C may also reach a rank twice, from the terminal and from a launcher. A person who presses it again does not want to wait for long.
_SAME_CTRL_C_SECONDS = 1.0


class StopSignals:
    """A context manager for the main thread, which handles the signals. The first signal sets ``pulse.stop_signal``.

    SIGINT stays ignored if it was: a shell starts a command in the background so, and Ctrl-C is then meant for another command. During the
    start of a run (``pulse.can_stop`` is False) nothing is there to be saved, and SIGINT raises KeyboardInterrupt as it does without this
    class.
    """

    def __init__(self) -> None:
        self.requested_at: float | None = None
        """Monotonic seconds of the first signal."""
        self.name = ""
        """The name of the first signal for people."""
        self.is_urgent = False
        """This flag tells whether a later signal has asked again."""

    def __enter__(self) -> StopSignals:
        pulse.stop_signal, pulse.can_stop = 0, False
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._handled = [number for number in STOP_SIGNALS if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
        self._old_handlers: dict[signal.Signals, Any] = {number: signal.signal(number, self._on_signal) for number in self._handled}
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._owner = os.getpid()
        # Schedulers signal every process of a job. A forked data worker must not end by the signal, before the rank has saved, and must not
        # write to this process's pipe; it ends with its parent. Signals are blocked during the fork, because the child has its parent's
        # handlers until _forget has removed them.
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
        """Wait until a signal comes or :meth:`wake` is called, for ``seconds`` at most, and note the signal. A thread other than the main
        thread calls this."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        for number in os.read(self._read, 256) if ready else b"":
            if number in self._handled:
                self._note(signal.Signals(number))

    def wake(self) -> None:
        """End the running :meth:`wait`."""
        os.write(self._write, b"\0")

    @property
    def is_ctrl_c(self) -> bool:
        """Tell whether the first signal was SIGINT: a person waits, and may ask again."""
        return self.name == signal_name(signal.SIGINT)

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.requested_at is None:
            self.requested_at, self.name = now, signal_name(number)
            pulse.stop_signal = pulse.stop_signal or number
        elif now - self.requested_at > (_SAME_CTRL_C_SECONDS if self.is_ctrl_c else _SAME_REQUEST_SECONDS):
            self.is_urgent = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask for the end as soon as the main thread runs. Whether the signal is the second is decided by what the pipe has, since this
        handler may run late."""
        if number == signal.SIGINT and not pulse.can_stop:
            raise KeyboardInterrupt
        pulse.stop_signal = pulse.stop_signal or number

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


def signal_name(number: int) -> str:
    """Return the name of a signal for people."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class GuestInterrupts:
    """A context manager for a run in a process that belongs to somebody else. The first Ctrl-C sets ``pulse.stop_signal``, so that the
    run saves and ends. A second Ctrl-C, and any Ctrl-C during the start, raises KeyboardInterrupt at once.

    In a thread other than the main thread nothing is changed, since Ctrl-C does not interrupt such a thread.
    """

    def __enter__(self) -> GuestInterrupts:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._old_handler = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if self._old_handler is None else self._old_handler)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if pulse.stop_signal or not pulse.can_stop:
            raise KeyboardInterrupt
        pulse.stop_signal = number
