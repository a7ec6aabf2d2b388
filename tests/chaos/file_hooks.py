"""Faults of files inside a rank: the rank is killed in the middle of a group of changes, or a file cannot be read or written.

As the hooks of hooks.py, the launcher sets them before training begins, and they leave a mark when they strike. They do not depend on
w1train's code that opens, renames or removes a file, because they see the calls themselves.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.end_to_end.runs import Sabotage
from w1train.runtime import files

_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""Python's audit events of changes of a directory. An event ``open`` is one only if the file is opened for writing."""


def kill_at_change(mark: Path, *, victim: int, word: str, number: int, group: int = 0) -> Sabotage:
    """Make rank ``victim`` kill itself once, before the ``number``-th change of files whose path has ``word`` in it, or before the last
    change of the group if there are fewer. The last change of a group gives a directory a name without the word, or removes it.

    The removal of a directory's content counts with the directory, although its events have names without the directory.

    Args:
        group: the number of groups of changes that pass before.
    """

    def sabotage(rank: int) -> None:
        if rank != victim or mark.exists():
            return
        num_groups, num_changes, thread = 0, 0, 0

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal num_groups, num_changes, thread
            if event not in _CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            is_named = any(word in str(path) for path in arguments[:2])
            is_removal = event in ("os.remove", "os.rmdir") and thread == threading.get_ident()
            if not (is_named or is_removal):
                return
            thread = threading.get_ident()
            num_changes += 1
            is_last = _is_last(event, word, arguments)
            if num_groups == group and (num_changes == number or is_last):
                kill_myself(mark, f"before {event} of {arguments[0]}")
            if is_last:
                num_groups, num_changes, thread = num_groups + 1, 0, 0

        sys.addaudithook(audit)

    return sabotage


def _is_last(event: str, word: str, arguments: tuple[Any, ...]) -> bool:
    """Tell whether a change ends its group."""
    return word in str(arguments[0]) and (event == "os.rmdir" or (event == "os.rename" and word not in str(arguments[1])))


def kill_myself(mark: Path, where: str) -> None:
    """Leave the mark, and end this process as the kernel would."""
    mark.write_text(where)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_files(mark: Path, code: int, mode: str, is_bad: Callable[[str], bool]) -> Sabotage:
    """Make each read ("r") or write ("w") of the files whose path ``is_bad`` accepts fail. Opening them succeeds.

    Args:
        code: the number of the OSError.
    """

    def open_file(*arguments: Any, **options: Any) -> _FailingFile:
        mark.touch()
        file = _FailingFile(*arguments, **options)
        file.code = code
        return file

    replace = _replace_read_files if mode == "r" else _replace_written_files
    return lambda rank: replace(is_bad, open_file)


def slow_file(mark: Path, *, victim: int, name: str, seconds: float) -> Sabotage:
    """Make each write of rank ``victim`` to the file whose path ends with ``name`` take half a second, until the given seconds are over.
    Then the mark is left. A start that finds the mark is not disturbed."""

    def open_file(*arguments: Any, **options: Any) -> _SlowFile:
        file = _SlowFile(*arguments, **options)
        file.mark, file.seconds_left = mark, seconds
        return file

    def sabotage(rank: int) -> None:
        if rank == victim:
            _replace_written_files(lambda path: path.endswith(name) and not mark.exists(), open_file)

    return sabotage


def _replace_read_files(is_chosen: Callable[[str], bool], open_file: Callable[..., io.FileIO]) -> None:
    """Replace chosen files that this process opens to read bytes by those of ``open_file``."""
    original = io.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "rb" or not isinstance(path, str | Path) or not is_chosen(str(path)):
            return original(path, mode, *args, **kwargs)
        return io.BufferedReader(open_file(path, mode))

    io.open = builtins.open = opened  # pathlib calls io.open, and all others the builtin


def _replace_written_files(is_chosen: Callable[[str], bool], open_file: Callable[..., io.FileIO]) -> None:
    """Replace chosen files that w1train opens to write them by those of ``open_file``. w1train opens them all with its own class, which
    refuses links."""
    original = files.NamedFile

    def opened(path: str, *args: Any, **kwargs: Any) -> io.FileIO:
        return (open_file if is_chosen(path) else original)(path, *args, **kwargs)

    files.NamedFile = opened  # type: ignore[assignment, misc]


class _FailingFile(io.FileIO):
    """A file on a disk on which every read and write fails."""

    code: int

    def readinto(self, _buffer: Any) -> int:
        raise OSError(self.code, os.strerror(self.code), str(self.name))

    def readall(self) -> bytes:
        raise OSError(self.code, os.strerror(self.code), str(self.name))

    def write(self, _data: Any) -> int:
        raise OSError(self.code, os.strerror(self.code), str(self.name))


class _SlowFile(io.FileIO):
    """A file on a disk that is slow for some time."""

    mark: Path
    seconds_left: float

    def write(self, data: Any) -> int:
        if self.seconds_left > 0:
            time.sleep(0.5)
            self.seconds_left -= 0.5
            if self.seconds_left <= 0:
                self.mark.touch()
        # The rest of the buffer is written by the next calls: a file of few writes takes as long as one of many.
        return super().write(memoryview(data)[: 1 << 14] if self.seconds_left > 0 else data)
