"""The workers that prepare micro-batches ahead of the training step: threads, or processes that hand batches over in shared memory.

Both kinds return micro-batches in the order in which these were asked for. A worker that dies is an error at once, and a read that hangs is
an error after a timeout. Neither prevents the run from ending.

Shapes: b = micro_batch_size, l = sequence_length.
"""

from __future__ import annotations

import logging
import math
import mmap
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from w1train.data.batch import PackedBatch

logger = logging.getLogger(__name__)

Load = Callable[[int], PackedBatch]
"""A function that makes the micro-batch which begins at a global sample index."""
_STOP_SECONDS = 2.0
_WATCH_SECONDS = 1.0


class LoaderError(OSError):
    """The error of a data path that has stopped, because a read hangs or a worker died."""


class Workers(Protocol):
    """The interface of the workers."""

    def submit(self, start: int) -> None:
        """Ask for the micro-batch that begins at a global sample index."""

    def receive(self) -> PackedBatch:
        """Return the oldest micro-batch that was asked for and has not been received yet.

        Raises:
            LoaderError: if the worker died, or the micro-batch does not come in time; otherwise the worker's own exception.
        """
        ...

    def close(self) -> None:
        """Stop the workers. Micro-batches that have been asked for are lost."""


class ThreadWorkers:
    """Workers that are threads of this process.

    The threads are daemons: a thread that hangs in a read cannot be stopped, and must not prevent the process from ending.
    """

    def __init__(self, load: Load, num_workers: int, timeout: float, enter: Callable[[], None]) -> None:
        """
        Args:
            timeout: seconds to wait for a micro-batch.
            enter: called in each thread before its first micro-batch.
        """
        self._load, self._enter, self._timeout = load, enter, timeout
        self._tasks: queue.SimpleQueue[tuple[int, Future[PackedBatch]] | None] = queue.SimpleQueue()
        self._pending: deque[tuple[int, Future[PackedBatch]]] = deque()
        names = (f"w1train-data-{number}" for number in range(num_workers))
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def submit(self, start: int) -> None:
        """Ask for a micro-batch, as in ``Workers``."""
        task: tuple[int, Future[PackedBatch]] = (start, Future())
        self._pending.append(task)
        self._tasks.put(task)

    def receive(self) -> PackedBatch:
        """Return the next micro-batch, as in ``Workers``."""
        start, future = self._pending.popleft()
        try:
            return future.result(self._timeout)
        except FutureTimeout:
            if future.done():  # the worker itself raised an error of this class
                raise
            raise hangs(start, self._timeout) from None
        except CancelledError:
            raise LoaderError(f"the micro-batch of sample {start} was given up when the loader was closed") from None

    def close(self) -> None:
        """Stop the workers, as in ``Workers``."""
        for _, future in self._pending:
            future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hanging = [thread.name for thread in self._threads if thread.is_alive()]
        if hanging:
            logger.warning("these threads hang in a read and were left behind: %s", ", ".join(hanging))

    def _work(self) -> None:
        self._enter()
        while (task := self._tasks.get()) is not None:
            start, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._load(start))
            except BaseException as error:  # the caller raises it, whatever it is
                future.set_exception(error)


@dataclass(slots=True)
class _Slot:
    """The shared memory of one micro-batch. It is mapped before the fork, so both processes see it, and freed when both have ended."""

    arrays: dict[str, NDArray[Any]]
    """Each field of the batch by name."""

    @classmethod
    def allocate(cls, batch_size: int, length: int) -> _Slot:
        return cls({field.name: _shared_array(field.dtype, field.shape(batch_size, length)) for field in PackedBatch.fields()})

    def write(self, batch: PackedBatch) -> None:
        for name, array in self.arrays.items():
            array[...] = getattr(batch, name).numpy()

    def read(self) -> PackedBatch:
        """Return a copy of the batch, because the slot will be written again."""
        return PackedBatch(**{name: torch.from_numpy(array.copy()) for name, array in self.arrays.items()})


def _shared_array(dtype: np.dtype, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array in memory that this process shares with the processes that it forks."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    slots: Sequence[_Slot]
    num_asked: int = 0


class ProcessWorkers:
    """Workers that are forked processes. They are asked in turn, and each has a slot of shared memory for every micro-batch that it may
    owe."""

    def __init__(self, load: Load, num_workers: int, prefetch: int, timeout: float, shape: tuple[int, int]) -> None:
        """
        Args:
            prefetch: the most micro-batches that all workers together owe at a time.
            timeout: seconds to wait for a micro-batch.
            shape: (b, l).
        """
        self._timeout = timeout
        self._pending: deque[tuple[int, _Worker]] = deque()
        self._num_submitted = 0
        context = multiprocessing.get_context("fork")
        num_slots = -(-prefetch // num_workers)
        self._workers: list[_Worker] = []
        for number in range(num_workers):
            ours, theirs = context.Pipe()
            slots = [_Slot.allocate(*shape) for _ in range(num_slots)]
            arguments = (load, theirs, slots, os.getpid())
            process = context.Process(target=_work, args=arguments, name=f"w1train-data-{number}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, slots))

    def submit(self, start: int) -> None:
        """Ask for a micro-batch, as in ``Workers``; the workers may owe at most ``prefetch`` micro-batches at a time."""
        worker = self._workers[self._num_submitted % len(self._workers)]
        try:
            worker.connection.send((start, worker.num_asked % len(worker.slots)))
        except OSError:
            raise self._died(worker) from None
        self._pending.append((start, worker))
        worker.num_asked += 1
        self._num_submitted += 1

    def receive(self) -> PackedBatch:
        """Return the next micro-batch, as in ``Workers``."""
        start, worker = self._pending.popleft()
        deadline = time.monotonic() + self._timeout
        # The death of any worker is noticed at once, not only that of the worker whose turn it is.
        sentinels = {other.process.sentinel: other for other in self._workers}
        while not worker.connection.poll():
            ready = wait([worker.connection, *sentinels], timeout=max(0.0, deadline - time.monotonic()))
            dead = next((sentinels[sentinel] for sentinel in sentinels if sentinel in ready), None)
            if dead is not None and not worker.connection.poll():
                raise self._died(dead)
            if not ready:
                raise hangs(start, self._timeout)
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            raise self._died(worker) from None
        if isinstance(answer, BaseException):
            raise answer
        return worker.slots[answer].read()

    def close(self) -> None:
        """Stop the workers, as in ``Workers``, by SIGKILL, which also ends a process that hangs in a read."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(_STOP_SECONDS)
            worker.connection.close()
        self._pending.clear()

    def _died(self, worker: _Worker) -> LoaderError:
        worker.process.join(_STOP_SECONDS)
        code = worker.process.exitcode
        cause = "no exit status yet" if code is None else f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        advice = "; the most frequent reason for SIGKILL is that the machine has no memory left" if code == -signal.SIGKILL else ""
        advice = advice or ("; SIGBUS means that a mapped file was cut short" if code == -signal.SIGBUS else "")
        return LoaderError(f"data worker {worker.process.name} (process {worker.process.pid}) died: {cause}{advice}")


def hangs(start: int, timeout: float) -> LoaderError:
    """Return the error of a micro-batch that does not come."""
    return LoaderError(
        f"no micro-batch has come for {timeout:g} s (data.read_timeout): the read of sample {start} hangs. Check the file system of the "
        "training data, or increase data.read_timeout"
    )


def _work(load: Load, connection: Connection, slots: Sequence[_Slot], parent: int) -> None:
    """Make micro-batches until the parent process ends.

    The pipe does not show the parent's death, since the worker's siblings have inherited the other end of it; the parent's id does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the group, and the parent decides what to do
    torch.set_num_threads(1)
    while True:
        while not connection.poll(_WATCH_SECONDS):
            if os.getppid() != parent:
                return
        try:
            start, slot = connection.recv()
            answer: object = slot
            try:
                slots[slot].write(load(start))
            except Exception as error:  # the parent raises it at its place in the order
                answer = error
            connection.send(answer)
        except (EOFError, BrokenPipeError):
            return
