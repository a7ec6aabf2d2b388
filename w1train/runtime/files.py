"""Files that are either the old one or the new one, never half of either; neither a kill nor a power cut makes it otherwise."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file that is being written. The name is fixed, so that what a kill leaves is overwritten, not collected."""


@contextmanager
def replace_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` for writing; it takes ``path``'s place when the block ends without an exception.

    Raises OSError (no space, no permission), with ``path`` untouched and the file beside it removed.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{PARTIAL_SUFFIX}")
    try:
        with open(partial, "wb") as file:
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
    """Hold the lock that stands for ``path`` (a file beside it): of several processes on a machine that would make the same file, one does,
    while the others wait. The kernel frees the lock of a process that ends, however it ends.

    Raises OSError if the file system has no locks.
    """
    path = Path(path)
    with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` through :func:`replace_file`."""
    with replace_file(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 through :func:`replace_file`; a lone surrogate, which UTF-8 has not, is written as its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def copy_if_different(source: str | Path, target: str | Path) -> None:
    """Give ``target`` the content of ``source`` through :func:`replace_file`; a target that has it already is not touched."""
    content = Path(source).read_bytes()
    if not Path(target).exists() or Path(target).read_bytes() != content:
        write_bytes(target, content)


def sync_directory(directory: str | Path) -> None:
    """Make renames in a directory survive a power cut (a rename alone may be lost, or come before the file's content)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
