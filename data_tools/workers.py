"""Workers that apply a function to each item of a sequence, on several cores, and return the results in the order of the sequence."""

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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from w1train.runtime.ctrl_c import ctrl_c_waits

_ITEMS_AHEAD = 2
_SECONDS_TO_END = 5.0
_SECONDS_OF_AN_ITEM = 1.0
"""The seconds to wait for an item after a fault, which is longer than a unit takes."""
MAX_THREADS = 8
"""The most threads. More would wait for each other: about a fourteenth of tokenizing is Python code, which one thread runs at a time."""


@contextmanager
def ordered_workers[Setting, Item, Result](
    num_workers: int, make: Callable[[Setting], Callable[[Item], Result]], setting: Setting
) -> Iterator[Callable[[Iterable[Item]], Iterator[tuple[Item, Result]]]]:
    """Start workers, each of which makes its function once by ``make(setting)``. The context gives a function that maps items to pairs of
    an item and its result, in the order of the items.

    One worker is this thread. A few workers are threads, since the tokenizer library lets other threads run while it works. More workers
    are processes.
    """
    if num_workers > MAX_THREADS:
        with OrderedWorkers(num_workers, make, setting) as workers:
            yield workers.map
    else:
        with _one_thread_a_tokenizer(), OrderedThreads(num_workers, make, setting) as threads:
            yield threads.map


@contextmanager
def _one_thread_a_tokenizer() -> Iterator[None]:
    """Switch off the library's own threads, of which it would start as many as there are cores."""
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
    """Workers that are threads of this process; use it as a context manager. Memory does not grow with the number of items."""

    def __init__[Setting](self, num_threads: int, make: Callable[[Setting], Callable[[Item], Result]], setting: Setting) -> None:
        self._make: Callable[[], Callable[[Item], Result]] = lambda: make(setting)
        self._function = make(setting) if num_threads == 1 else None
        self._inbox: queue.SimpleQueue[tuple[Item, Future[Result]] | None] = queue.SimpleQueue()
        # The threads are daemons, unlike those of concurrent.futures: Ctrl-C would wait half a minute for a document of 50 MB.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num_threads if num_threads > 1 else 0)]
        for thread in self._threads:
            thread.start()

    def map(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item with its result, in the order of the items. An exception of the function is raised at the place of its item."""
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
            except BaseException as error:  # the exception is raised where the result is asked for
                future.set_exception(error)
            del task, item, future  # otherwise an idle thread would keep its last item and result in memory

    def __enter__(self) -> OrderedThreads[Item, Result]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()
        for _ in self._threads:
            self._inbox.put(None)
        # After a fault, a thread with a long item is not waited for: it ends after the item, or with this process.
        until = time.monotonic() + _SECONDS_OF_AN_ITEM
        for thread in self._threads:
            thread.join(None if kind is None else max(0.0, until - time.monotonic()))


class WorkerError(RuntimeError):
    """The error of a worker that died: it had no memory left, was killed, or raised an exception, whose traceback is in the log."""


class OrderedWorkers[Item, Result]:
    """Workers that are processes, each of which makes its function once from a setting; use it as a context manager.

    The workers get items in turn, and each holds at most two, so that memory does not grow with the number of items. The workers end with
    this process, however it ends.
    """

    def __init__[Setting](self, num_workers: int, make: Callable[[Setting], Callable[[Item], Result]], setting: Setting) -> None:
        """Start the processes. ``make`` and ``setting`` are sent to them, and must be picklable."""
        self._workers = [_start(make, setting) for _ in range(num_workers)]

    def map(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item with its result, in the order of the items.

        Raises:
            WorkerError: if a worker dies; the message names the items that it had.
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
    # Processes are spawned. A fork would copy locks of the threads of the tokenizer and the progress bar, and the other workers'
    # connections, which would then not close when this process ends.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, make, setting), daemon=True)
    resource_tracker.ensure_running()  # its start unblocks SIGINT in this process
    # After Ctrl-C, this process closes the connection. The worker would print a traceback, also in the middle of its imports.
    with ctrl_c_waits():
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(connection: Connection, make: Callable, setting: object) -> None:
    """Process items until the other end is closed. A thread receives them, so that the sender never waits for the computation."""
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
