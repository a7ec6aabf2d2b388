"""A function on every item of a sequence, on several cores, with the results in the sequence's order."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

_ITEMS_AHEAD = 2
_SECONDS_TO_END = 5.0
_SECONDS_OF_AN_ITEM = 1.0
"""Longer than a unit takes."""
MAX_THREADS = 8
"""More threads would wait for each other: about a fourteenth of tokenizing is Python, which one thread at a time runs."""


@contextmanager
def ordered_workers[Setting, Item, Result](
    num_workers: int, make: Callable[[Setting], Callable[[Item], Result]], setting: Setting
) -> Iterator[Callable[[Iterable[Item]], Iterator[tuple[Item, Result]]]]:
    """Workers that each make a function from a setting once: what is yielded maps items to (item, result), in the order of the items.

    One worker is this thread, a few are threads (the tokenizer library lets others run while it works), more are processes.
    """
    if num_workers > MAX_THREADS:
        with OrderedWorkers(num_workers, make, setting) as workers:
            yield workers.map
    else:
        with _one_thread_a_tokenizer(), OrderedThreads(num_workers, make, setting) as threads:
            yield threads.map


@contextmanager
def _one_thread_a_tokenizer() -> Iterator[None]:
    """The library's own threads off, which would be as many as there are cores, whatever was asked for."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class OrderedThreads[Item, Result]:
    """Threads of this process; use as a context manager. Memory does not depend on how many items there are to come."""

    def __init__[Setting](self, num_threads: int, make: Callable[[Setting], Callable[[Item], Result]], setting: Setting) -> None:
        self._make: Callable[[], Callable[[Item], Result]] = lambda: make(setting)
        self._function = make(setting) if num_threads == 1 else None
        self._inbox: queue.SimpleQueue[tuple[Item, Future[Result]] | None] = queue.SimpleQueue()
        # Daemons, unlike those of concurrent.futures: Ctrl-C would wait for a document of 50 MB for half a minute.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num_threads if num_threads > 1 else 0)]
        for thread in self._threads:
            thread.start()

    def map(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, in the order of the items; what the function raises is raised in its item's place."""
        if self._function is not None:
            for item in items:
                yield item, self._function(item)
            return
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            if len(waiting) == _ITEMS_AHEAD * len(self._threads):
                first, future = waiting.popleft()
                yield first, future.result()
            future = Future()
            waiting.append((item, future))
            self._inbox.put((item, future))
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()

    def _work(self) -> None:
        function: Callable[[Item], Result] | None = None
        while (task := self._inbox.get()) is not None:
            item, future = task
            try:
                function = function or self._make()
                future.set_result(function(item))
            except BaseException as error:  # raised again where the result is wanted
                future.set_exception(error)
            del task, item, future  # or an idle thread would keep its last item and result

    def __enter__(self) -> OrderedThreads[Item, Result]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()
        for _ in self._threads:
            self._inbox.put(None)
        # After a fault, a thread that has a long item is left to end by itself, or with this process.
        until = time.monotonic() + _SECONDS_OF_AN_ITEM
        for thread in self._threads:
            thread.join(None if kind is None else max(0.0, until - time.monotonic()))


class WorkerError(RuntimeError):
    """A worker that died: it ran out of memory, was killed, or has a fault (then its traceback is in the log)."""


class OrderedWorkers[Item, Result]:
    """Worker processes, each of which makes its function from a setting once; use as a context manager.

    Items go round the workers, each of which holds at most two, so that memory does not depend on how many there are to come.
    Workers end with this process, however it ends.
    """

    def __init__[Setting](self, num_workers: int, make: Callable[[Setting], Callable[[Item], Result]], setting: Setting) -> None:
        """``make`` and ``setting`` are sent to the processes: they must be picklable."""
        self._workers = [_start(make, setting) for _ in range(num_workers)]

    def map(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, in the order of the items.

        Raises:
            WorkerError: naming the items that a worker had when it died.
        """
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
