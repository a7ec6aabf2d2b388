"""Files that are read at any place while a run lasts, and of which a bounded number is open.

A dataset may have hundreds of shards of two or three files each, and a process may have few files open (``ulimit -n``). So a file is opened
when it is read, and the file that was not read for the longest time is closed when too many are open.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import threading
import time
import weakref
from pathlib import Path

from w1train.data.indexed import DatasetError

logger = logging.getLogger(__name__)

_PASSING_FAULTS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
"""Errors of a file system on a network after which another attempt may succeed."""
_RETRY_SECONDS = (0.1, 0.5, 2.0)
_FEWEST_OPEN = 16
_LIMIT_PER_OPEN = 4
"""The share of the limit on open files that readers take is one in so many: sockets, workers and other files need the rest."""


class _Descriptor:
    """An open file. It is closed when no thread uses it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class FileReader:
    """A file for reading. Several threads and forked processes may use one object."""

    def __init__(self, path: str | Path) -> None:
        """Open the file.

        Raises:
            OSError: the file cannot be opened.
        """
        self.path = str(path)
        self._descriptor: _Descriptor | None = _Descriptor(self.path)
        self._status = os.fstat(self._descriptor.number)
        self._last_use = next(_USES)  # opening is a use: of files with equal numbers, any could be closed
        _OPEN.add(self)

    def size(self) -> int:
        """Return the number of bytes that the file has now."""
        descriptor = self._open()
        return os.fstat(descriptor.number).st_size

    def read(self, num_bytes: int, offset: int) -> bytes:
        """Return ``num_bytes`` bytes at ``offset``. The file has no position, so threads and forked processes do not disturb each other.

        Raises:
            DatasetError: if the file ends before these bytes do, or has been replaced by another file.
            OSError: if the file cannot be read, after several attempts where another attempt may help.
        """
        content = self._read_patiently(num_bytes, offset)
        while len(content) < num_bytes:
            part = self._read_patiently(num_bytes - len(content), offset + len(content))
            if not part:
                missing = num_bytes - len(content)
                raise DatasetError(
                    f"{self.path} was truncated while it was in use: it ends at byte {offset + len(content)}, {missing} before its end"
                )
            content += part
        return content

    def _read_patiently(self, num_bytes: int, offset: int) -> bytes:
        for seconds in _RETRY_SECONDS:
            try:
                return self._read_once(num_bytes, offset)
            except OSError as error:
                if error.errno not in _PASSING_FAULTS:
                    raise OSError(error.errno, error.strerror, self.path) from error
                where = f"{self.path}, bytes {offset} to {offset + num_bytes}"
                logger.warning("%s: %s; trying again in %g s", where, error.strerror, seconds)
                time.sleep(seconds)
        try:
            return self._read_once(num_bytes, offset)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, {len(_RETRY_SECONDS) + 1} times in a row", self.path) from error

    def _read_once(self, num_bytes: int, offset: int) -> bytes:
        # The variable keeps the file open. Otherwise another thread could close it now, and the number would become another file's.
        descriptor = self._open()
        return os.pread(descriptor.number, num_bytes, offset)

    def _open(self) -> _Descriptor:
        self._last_use = next(_USES)
        if (descriptor := self._descriptor) is not None:
            return descriptor
        descriptor = _Descriptor(self.path)
        self._require_same(os.fstat(descriptor.number))
        self._descriptor = descriptor
        _OPEN.add(self)
        return descriptor

    def close(self) -> None:
        """Close the file until it is read again."""
        self._descriptor = None

    @property
    def last_use(self) -> int:
        """The number of the last use, in the order of all uses in this process."""
        return self._last_use

    def _require_same(self, found: os.stat_result) -> None:
        """Raise DatasetError if the name now has another file. A file system that gives numbers of files anew shows the same size and time
        of change; a program that only touches files changes the time, and not the number."""
        first = self._status
        if found.st_ino != first.st_ino and (found.st_size, found.st_mtime_ns) != (first.st_size, first.st_mtime_ns):
            raise DatasetError(f"{self.path} was replaced by another file while it was in use; start the run again")


class _OpenFiles:
    """The readers of this process whose files are open."""

    def __init__(self) -> None:
        self._readers: weakref.WeakSet[FileReader] = weakref.WeakSet()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def add(self, reader: FileReader) -> None:
        """Note that a file was opened, and close those that were not read for the longest time if too many are open."""
        with self._lock:
            self._readers.add(reader)
            while len(self._readers) > _most_open():
                oldest = min((other for other in self._readers if other is not reader), key=lambda other: other.last_use)
                self._readers.discard(oldest)
                oldest.close()

    def _renew_lock(self) -> None:
        """Make a new lock in a forked child, because a thread of the parent that held the old lock does not exist there."""
        self._lock = threading.Lock()


def _most_open() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(_FEWEST_OPEN, soft // _LIMIT_PER_OPEN)


_OPEN = _OpenFiles()
_USES = itertools.count(1)
