"""Work beside the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_background(action: Callable[[], object], name: str) -> Future[None]:
    """Do ``action`` in a thread of this name; the future has its exception. The thread does not keep alive a process that has to end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            action()
        except BaseException as error:  # handed over: whoever waits for the future meets it
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def nothing() -> Future[None]:
    """Work that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
