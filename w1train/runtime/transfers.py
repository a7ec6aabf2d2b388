"""Reading and writing of checkpoints in pieces, so that slow storage does not look like a hang. Each piece takes a bounded time and is a
sign of progress, and ranks that wait for another rank's storage learn whether bytes move there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from w1train.runtime.background import in_background
from w1train.runtime.files import sync_file
from w1train.runtime.pulse import beat, moved, pulse

PIECE_BYTES = 16 << 20
"""The most bytes that a single read or write moves."""
SYNC_BYTES = 64 << 20
"""The most bytes that wait in the operating system's memory before they are sent to the disk: one fsync of a large file at its end could
take longer than health.hang_timeout, without a sign of progress."""
POLL_SECONDS = 0.01


class PiecewiseFile:
    """A file that is written from its beginning to its end, piece by piece."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._num_unsynced = file, 0

    def write(self, data: Any) -> int:
        """Write all of ``data``.

        Raises:
            OSError: the file cannot be written.
        """
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._file.write(piece)
            self._num_unsynced += len(piece)
            if self._num_unsynced >= SYNC_BYTES:
                self.sync()
            moved()
        return len(view)

    def sync(self) -> None:
        """Return when all that was written is on the disk.

        Raises:
            OSError: the file cannot be written.
        """
        sync_file(self._file)
        self._num_unsynced = 0
        moved()

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()


class Movement:
    """A memory of whether this process has read or written a byte of a checkpoint since it was last asked."""

    def __init__(self) -> None:
        self._seen = pulse.moved

    def is_new(self) -> bool:
        """Return whether a byte has moved since the last call."""
        before, self._seen = self._seen, pulse.moved
        return self._seen != before


def agree(values: list[int]) -> list[int]:
    """Return the largest of each value over all ranks, through host memory. Every rank calls this."""
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def together[Result](action: Callable[[], Result]) -> Callable[[], Result]:
    """Do ``action`` in a thread on every rank, and return on every rank when all ranks are done. ``action`` reads or writes files, and
    talks to no other rank. A rank that is done early waits, which would look like a hang. Here each rank learns whether bytes still move on
    any rank, and counts this as its own progress.

    Returns:
        A function that gives the result of ``action``, or raises what it raised.
    """
    work, movement = in_background(action, "transfer"), Movement()
    while True:
        is_running, is_moving = agree([not work.done(), movement.is_new()])
        if is_moving:
            beat()
        if not is_running:
            return work.result
        time.sleep(POLL_SECONDS)
