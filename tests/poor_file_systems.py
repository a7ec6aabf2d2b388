"""File systems that cannot do all that others can: they answer as gocryptfs, CIFS, Lustre without locks or a read-only mount do."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

NO_DIRECTORY_SYNC = [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENXIO, errno.ENOTTY, errno.EROFS, 524]
NO_LOCKS = [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF, 524]


def error_of(code: int, *path: object) -> OSError:
    return OSError(code, os.strerror(code), *path)


def sync_no_directory(patch: pytest.MonkeyPatch, code: int = errno.EINVAL) -> None:
    """Files can be synced, and directories cannot."""
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise error_of(code)
        fsync(descriptor)

    patch.setattr(os, "fsync", sync)


def lock_nothing(patch: pytest.MonkeyPatch, code: int = errno.ENOLCK, but_in: Path | None = None) -> None:
    """No file can be locked, except below ``but_in``."""
    flock = fcntl.flock

    def lock(file: Any, operation: int) -> None:
        if but_in is None or not Path(file.name).is_relative_to(but_in):
            raise error_of(code)
        flock(file, operation)

    patch.setattr(fcntl, "flock", lock)


def make_read_only(patch: pytest.MonkeyPatch, directory: Path, code: int = errno.EROFS) -> None:
    """Nothing in a directory can be opened for writing: root, who runs tests in containers, may write whatever the mode is."""
    open_file = os.open

    def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and Path(path).is_relative_to(directory):
            raise error_of(code, path)
        return open_file(path, flags, *arguments, **options)

    patch.setattr(os, "open", opened)
