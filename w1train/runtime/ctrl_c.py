"""Ctrl-C before and after the work of a command, while nothing has to be tidied up: the process ends at once, with one line.

During imports, Python would raise KeyboardInterrupt in the middle of a module, and print a traceback. This module imports nothing that
takes time, so that a command can call it first.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_INTERRUPTED = 130  # ExitStatus.INTERRUPTED, whose module takes longer to import
_SOON_SECONDS = 0.05


class _End:
    """A handler of SIGINT that ends the process."""

    def __init__(self, program: str) -> None:
        self._line = f"{program}: ended by Ctrl-C\n".encode()

    def __call__(self, *_: object) -> None:
        os.write(2, self._line)
        os._exit(_INTERRUPTED)


def end_at_ctrl_c(program: str) -> None:
    """Let Ctrl-C end this process at once with one line, until :func:`ctrl_c_raises`. ``program`` is the name in the line.

    SIGINT stays ignored if it was: a shell starts a command in the background so. A launcher may have blocked SIGINT since the start of the
    process, because Python's own start does not survive it. It is unblocked here.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler or isinstance(signal.getsignal(signal.SIGINT), _End):
        signal.signal(signal.SIGINT, _End(program))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the context, so that the command tidies up. Nothing changes in a process that has not
    called :func:`end_at_ctrl_c`: it belongs to somebody else."""
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, _End):
        yield
        return
    hook = sys.unraisablehook
    timers: list[Any] = []
    try:
        sys.unraisablehook = _raise_again(hook, timers)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook
        for timer in timers:  # another KeyboardInterrupt may have ended the command by now
            timer.cancel()


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the context. A process that starts within it never gets Ctrl-C, unless it unblocks SIGINT."""
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _raise_again(hook: Any, timers: list[Any]) -> Any:
    """Return a hook for exceptions in a place where Python ignores them, such as the callback of a weak reference in the middle of an
    import. A KeyboardInterrupt there would be a traceback, and would end nothing. It is raised again a moment later, by a timer that is
    added to ``timers``."""

    def raise_again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            import threading

            # The signal is sent to the main thread itself, which may wait for a lock that a signal to another thread does not interrupt.
            main = threading.main_thread().ident
            assert main is not None
            timer = threading.Timer(_SOON_SECONDS, signal.pthread_kill, [main, signal.SIGINT])
            timer.daemon = True
            timers.append(timer)
            timer.start()
        else:
            hook(unraisable)

    return raise_again
