"""Names that were read from a file, and the files that they may name: only files of the directory in which the names were read."""

from __future__ import annotations

import os
import re
import stat
from io import BufferedReader
from pathlib import Path

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,199}")


def is_plain_name(name: object) -> bool:
    """Tell whether a value is a plain file name: no separator, no drive, no blank, no control character."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None and name not in (".", "..")


def open_inside(directory: Path, name: str) -> BufferedReader:
    """Open a regular file of a directory for reading.

    Raises:
        OSError: the file is not there, cannot be read, or is a link, a pipe or a device. Whoever wrote the directory could otherwise make
            w1train read any file that the user may read (and copy it into a log or an export), or wait for ever.
    """
    assert is_plain_name(name), name
    return open(directory / name, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    """Open as ``os.open`` does, but only regular files."""
    # O_NONBLOCK: opening a pipe would wait for somebody who writes into it.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor
