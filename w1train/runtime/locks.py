"""Locks of files, which the kernel frees when the process that holds them ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from w1train.runtime.files import NOT_SUPPORTED, errors_named, open_in_place

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, *NOT_SUPPORTED)
"""Answers of file systems without locks: Lustre that is mounted without them, NFS without its lock daemon, some FUSE mounts."""


def lock_file(file: BinaryIO, *, wait: bool) -> OSError | None:
    """Lock an open file until it is closed.

    Args:
        wait: wait while another process holds the lock.

    Returns:
        None, or the error of a file system that has no locks. Then the file is not locked, and the caller says what follows from it.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
        OSError: the lock cannot be taken for another reason.
    """
    try:
        with errors_named(file.name):
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return error
    return None


@contextmanager
def exclusive(path: str | Path) -> Iterator[str]:
    """Hold the lock of ``path`` (a file beside it). If several processes on a machine want to make the same file, one of them makes it, and
    the others wait. If the file system has no locks, the lock is a file in the machine's temporary directory.

    Yields:
        The argument ``writer`` of ``replace_file``. It has the name of the machine, because other machines may have locks of their own, and
        where there are no locks at all also the number of the process.

    Raises:
        OSError: the lock's file cannot be opened.
        UnsafeFileError: something other than a file has the lock's name.
    """
    path, machine = Path(path), f".{socket.gethostname()}"
    beside, local = path.with_name(f".{path.name}.lock"), _local_lock(path)
    with contextlib.ExitStack() as held:
        is_locked = _take(held, beside, f"the processes of this machine use {local} instead") or _take(
            held, local, "several processes may do the same work at the same time"
        )
        yield machine if is_locked else f"{machine}.{os.getpid()}"


def _take(held: contextlib.ExitStack, path: Path, otherwise: str) -> bool:
    """Wait for the lock of a file, and return whether it is held. If not, warn that the file system has no locks, and what follows."""
    refusal = lock_file(held.enter_context(open_in_place(path, "ab")), wait=True)
    if refusal is not None:
        logger.warning("%s: this file system has no locks, and %s", refusal, otherwise)
    return refusal is None


def _local_lock(path: Path) -> Path:
    """Return the path of a lock that only this machine has. Each user has a lock, because a user may not open the files of another user."""
    code = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"w1train-{os.getuid()}-{code}.lock"
