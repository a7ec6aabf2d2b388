"""A function on every item of a sequence, in processes of their own, with the results in the sequence's order."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

_ITEMS_AHEAD = 2
_SECONDS_TO_END = 5.0


class WorkerError(RuntimeError):
    """A worker that died: it ran out of memory, was killed, or has a fault (then its traceback is in the log)."""


class OrderedWorkers[Item, Result]:
    """Worker processes, each of which makes its function from a setting once; use as a context manager.

    With one worker everything happens in this process. Otherwise items go round the workers, each of which holds at most
    two, so that memory does not depend on how many there are to come. Workers end with this process, however it ends.
    """

    def __init__[Setting](self, num_workers: int, make: Callable[[Setting], Callable[[Item], Result]], setting: Setting) -> None:
        """``make`` and ``setting`` are sent to the processes: they must be picklable."""
        self._function = make(setting) if num_workers == 1 else None
        self._workers = [] if num_workers == 1 else [_start(make, setting) for _ in range(num_workers)]

    def map(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, in the order of the items.

        Raises:
            WorkerError: naming the items that a worker had when it died.
        """
        if self._function is not None:
            yield from ((item, self._function(item)) for item in items)
            return
        waiting: deque[tuple[Item, _Worker]] = deque()
        for number, item in enumerate(items):
            if len(waiting) == _ITEMS_AHEAD * len(self._workers):
                yield self._receive(waiting)
            worker = self._workers[number % len(self._workers)]
            waiting.append((item, worker))
            try:
                worker.connection.send(item)
            except OSError as error:
                raise worker.death(waiting) from error
        while waiting:
            yield self._receive(waiting)

    def _receive(self, waiting: deque[tuple[Item, _Worker]]) -> tuple[Item, Result]:
        item, worker = waiting[0]
        try:
            result = worker.connection.recv()
        except (EOFError, OSError) as error:
            raise worker.death(waiting) from error
        waiting.popleft()
        return item, result

    def __enter__(self) -> OrderedWorkers[Item, Result]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for worker in self._workers:
            worker.connection.close()
            if kind is not None:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(_SECONDS_TO_END)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()


class _Worker:
    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process = process
        self.connection = connection

    def death(self, waiting: Iterable[tuple[object, _Worker]]) -> WorkerError:
        self.process.join(_SECONDS_TO_END)
        code = self.process.exitcode
        how = f"signal {-code}, {signal.strsignal(-code)}" if code is not None and code < 0 else f"exit status {code}"
        items = ", ".join(str(getattr(item, "name", item)) for item, worker in waiting if worker is self)
        return WorkerError(f"a worker process died ({how}) while it had: {items}")


def _start(make: Callable, setting: object) -> _Worker:
    # Spawned: a fork would copy the locks of the tokenizer's and the progress bar's threads, and the other workers' connections, which
    # then would not close when this process ends.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, make, setting), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(connection: Connection, make: Callable, setting: object) -> None:
    """Take items until the other end is closed. A thread takes them in, so that sending never waits for computing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C ends the connection
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    function = make(setting)
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(connection, inbox), daemon=True).start()
    while (item := inbox.get()) is not None:
        try:
            connection.send(function(item))
        except BrokenPipeError:
            return


def _take_in(connection: Connection, inbox: queue.SimpleQueue) -> None:
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            inbox.put(None)
            return
