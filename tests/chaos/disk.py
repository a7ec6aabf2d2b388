"""A disk of a few megabytes for the directory of a run, and how it is filled.

For root, the disk is a small tmpfs. Other users cannot mount one, and set a limit on the size of files instead (RLIMIT_FSIZE), from outside
on running ranks, so that a shard cannot be written to its end.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

SIZE = "12m"
"""The size of ten checkpoints of the tiny run."""


def how_a_disk_fills() -> str:
    """Describe the disk in words, for the report."""
    if os.geteuid() == 0:
        return f"a tmpfs of {SIZE} for the run directory, on which another file takes the rest"
    return "a limit on the size of files (RLIMIT_FSIZE), set from outside on running ranks; a small tmpfs takes root to mount"


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Put a directory on a tmpfs of its own, if this user may mount one."""
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "w1train-chaos", str(directory)], capture_output=True)
    try:
        yield
    finally:
        if directory.is_mount():
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


class SmallDisk:
    """The small disk of a directory, which can be filled and freed."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._limited = directory, list[int]()

    def fill(self, num_bytes_left: int, pids: list[int]) -> str:
        """Fill the disk except for a number of bytes, or without a mount, limit files of these processes to this length. Return which it
        was, in words."""
        if self._directory.is_mount():
            free = shutil.disk_usage(self._directory).free
            with contextlib.suppress(OSError):  # a rank that is writing may fill the disk before
                (self._directory / "ballast").write_bytes(bytes(max(0, free - num_bytes_left)))
            return f"a tmpfs of {SIZE} with {num_bytes_left} bytes left"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(num_bytes_left, 100_000), resource.RLIM_INFINITY))
                self._limited.append(pid)
        return f"RLIMIT_FSIZE of {max(num_bytes_left, 100_000)} bytes"

    def free(self) -> None:
        """Make the disk as it was before ``fill``."""
        (self._directory / "ballast").unlink(missing_ok=True)
        for pid in self._limited:
            if psutil.pid_exists(pid):
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
