"""Work beside the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_background[Result](action: Callable[[], Result], name: str) -> Future[Result]:
    """Do ``action`` in a thread of this name, and return a future that gets its result or its exception. The thread does not prevent the
    process from ending."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            result = action()
        except BaseException as error:  # raised again where the future's result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def nothing() -> Future[None]:
    """Return a future that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
