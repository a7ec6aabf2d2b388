"""Files that are replaced whole: after a kill or a power cut a file has its old content or its new content, and never a part of either.

Every file that w1train writes at a name that somebody else can guess is opened here. In a directory that others may write to (/tmp, the
runs of a group), such a name may hold a link that somebody has put there, and a plain ``open(path, "w")`` would empty the file behind it.
Links to directories are followed, because a run may be on a scratch disk behind a link.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

PARTIAL_SUFFIX = ".partial"
"""The end of the name of a file that is being written. The name is fixed, so that the file that a kill leaves is overwritten by the next
write, and such files do not accumulate."""


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
    return open(path, "x+b", opener=_open_no_link)


def open_in_place(path: str | Path, mode: Literal["ab", "a+b", "r+b"]) -> BinaryIO:
    """Open a file for writing without emptying it. A file that is not there is made, unless the mode is "r+b".

    Raises:
        UnsafeFileError: the file is a symbolic link, has a second name (a hard link), or is not a regular file.
        OSError: the file cannot be opened.
    """
    return open(path, mode, opener=_open_no_link)


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
def replace_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` for writing. It takes the place of ``path`` when the block ends without an exception.

    Raises:
        OSError: no space, no permission. ``path`` is untouched, and the file beside it is removed.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{PARTIAL_SUFFIX}")
    try:
        with open_new(partial) as file:
            yield file
            file.flush()
            # Without this a power loss can leave the new name on a file whose bytes never reached the disk.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold the lock of ``path`` (a file beside it). If several processes on a machine want to make the same file, one of them makes it, and
    the others wait. The kernel frees the lock of a process that ends, however it ends.

    Raises:
        OSError: the file system has no locks.
        UnsafeFileError: something other than a file has the lock's name.
    """
    path = Path(path)
    with open_in_place(path.with_name(f".{path.name}.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    content = Path(source).read_bytes()
    if not Path(target).exists() or Path(target).read_bytes() != content:
        write_bytes(target, content)


def sync_directory(directory: str | Path) -> None:
    """Make renames in a directory survive a power cut. Otherwise a rename may be lost, or reach the disk before the file's content."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
