"""Files that are replaced whole: after a kill or a power cut a file has its old content or its new content, and never a part of either.

Every file that w1train writes at a name that somebody else can guess is opened here. In a directory that others may write to (/tmp, the
runs of a group), such a name may hold a link that somebody has put there, and a plain ``open(path, "w")`` would empty the file behind it.
Links to directories are followed, because a run may be on a scratch disk behind a link.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import tempfile
from collections.abc import Buffer, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
"""The end of the name of a file that is being written. The name is fixed, so that the file that a kill leaves is overwritten by the next
write, and such files do not accumulate."""
NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOTTY, 524)
"""Answers of file systems that do not know a call. 524 is the kernel's own ENOTSUPP, which some network file systems pass on."""
_NO_DIRECTORY_SYNC = (*NOT_SUPPORTED, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EROFS)
"""Answers of file systems that cannot sync a directory (gocryptfs, CIFS, some FUSE mounts), and of a directory that may be written to and
not be read."""
_WITHOUT_DIRECTORY_SYNC: set[int] = set()
"""The numbers of the file systems that this process has warned of."""


class UnsafeFileError(OSError):
    """An error about a name to which w1train would write, but which is not the single name of a regular file. The message says what to
    do."""


def open_new(path: str | Path) -> BinaryIO:
    """Open an empty file for reading and writing. A file, link or FIFO of that name is removed first, and what a link led to is not
    touched.

    Raises:
        OSError: no permission, or the name is a directory's.
    """
    Path(path).unlink(missing_ok=True)
    # "x": if somebody makes a file there between the removal and the opening, the kernel refuses to open it.
    return _buffered(NamedFile(os.fspath(path), "x+b", opener=_open_no_link))


def open_in_place(path: str | Path, mode: Literal["ab", "a+b", "r+b"]) -> BinaryIO:
    """Open a file for writing without emptying it. A file that is not there is made, unless the mode is "r+b".

    Raises:
        UnsafeFileError: the file is a symbolic link, has a second name (a hard link), or is not a regular file.
        OSError: the file cannot be opened.
    """
    return _buffered(NamedFile(os.fspath(path), mode, opener=_open_no_link))


class NamedFile(io.FileIO):
    """A file whose errors have its path: Python's errors of reads and writes do not tell which file they are about."""

    def readinto(self, buffer: Buffer, /) -> int | None:
        with errors_named(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with errors_named(self.name):
            return super().readall()

    def write(self, data: Buffer, /) -> int:
        with errors_named(self.name):
            return super().write(data)

    def truncate(self, size: int | None = None, /) -> int:
        with errors_named(self.name):
            return super().truncate(size)


def _buffered(file: NamedFile) -> BinaryIO:
    """Put the buffer around a file that ``open`` would."""
    return cast(BinaryIO, io.BufferedRandom(file) if file.readable() else io.BufferedWriter(file))


@contextmanager
def errors_named(path: str | Path) -> Iterator[None]:
    """Give an OSError of the block the path, unless it has a path: errors of an open file do not say which file it is."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _open_no_link(path: str, flags: int) -> int:
    """Do what ``open`` does with ``os.open``, and follow no link."""
    try:
        # Without O_NONBLOCK, opening a FIFO that nobody reads would wait for ever. It changes nothing for a regular file.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _unsafe(path, "is a symbolic link, and writing would change the file that it leads to") from None
        if error.errno == errno.ENXIO:
            raise _unsafe(path, "is no regular file") from None
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise _unsafe(path, f"has {status.st_nlink} names (hard links), and writing would change the file under the other names too")
    raise _unsafe(path, "is no regular file")


def _unsafe(path: str, reason: str) -> UnsafeFileError:
    advice = f"Look where it comes from (ls -li {path}), and remove it, or put a copy of its content in its place"
    return UnsafeFileError(f"{path} {reason}. {advice}")


@contextmanager
def replace_file(path: str | Path, writer: str = "") -> Iterator[BinaryIO]:
    """Open a file beside ``path`` for writing. It takes the place of ``path`` when the block ends without an exception.

    Args:
        writer: a part of the name of the file beside ``path``. Processes that may write the same file at the same time need different ones.

    Raises:
        OSError: no space, no permission. ``path`` is untouched, and the file beside it is removed.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{writer}{PARTIAL_SUFFIX}")
    try:
        with open_new(partial) as file:
            yield file
            # Without this a power loss can leave the new name on a file whose bytes never reached the disk.
            sync_file(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def replace_by_library(path: str | Path) -> Iterator[Path]:
    """Give a library that opens its file by itself a path in a new directory, to which nobody else may write. The file takes the place of
    ``path`` when the block ends without an exception."""
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        yield written
        os.replace(written, path)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` through :func:`replace_file`."""
    with replace_file(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 through :func:`replace_file`. A lone surrogate, which UTF-8 cannot express, is written as its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def copy_if_different(source: str | Path, target: str | Path) -> None:
    """Give ``target`` the content of ``source`` through :func:`replace_file`. A target that has this content already is not touched."""
    with errors_named(source):
        content = Path(source).read_bytes()
    with errors_named(target):
        is_equal = Path(target).exists() and Path(target).read_bytes() == content
    if not is_equal:
        write_bytes(target, content)


def sync_file(file: BinaryIO) -> None:
    """Return when all that was written to a file is on the disk.

    Raises:
        OSError: the file cannot be written; the error has its path.
    """
    file.flush()
    with errors_named(file.name):
        os.fsync(file.fileno())


def sync_directory(directory: str | Path) -> None:
    """Make renames in a directory survive a power cut. Otherwise a rename may be lost, or reach the disk before the file's content.

    Some file systems cannot do this. They are used nevertheless, with a warning: the content of the files is on the disk.

    Raises:
        OSError: the disk fails.
    """
    try:
        with errors_named(directory):
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
        _warn_of_renames(directory, error)


def _warn_of_renames(directory: str | Path, error: OSError) -> None:
    """Warn once for each file system: a run renames files in a new directory at each checkpoint."""
    if (file_system := os.stat(directory).st_dev) in _WITHOUT_DIRECTORY_SYNC:
        return
    _WITHOUT_DIRECTORY_SYNC.add(file_system)
    logger.warning(
        "%s: this file system cannot sync directories (%s). After a power cut, the names of its newest files may be lost; their content is "
        "on the disk",
        directory,
        error.strerror,
    )
