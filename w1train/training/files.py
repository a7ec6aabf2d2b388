"""Files that are either the old one or the new one, never half of either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` for writing; it takes ``path``'s place when the block ends without an exception.

    Raises OSError (no space, no permission), with ``path`` untouched and the file beside it removed.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            # Without this a power loss can leave the new name on a file whose bytes never reached the disk.
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 through :func:`replace_file`."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
